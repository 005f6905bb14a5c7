"""`python -m m4 demo` in a real browser: upload, generate, change the seed; what must not be served is not."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib

import pytest
from conftest import ROOT, environment

from m4.demo import server as demo_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(whole_run):
    """The address of a page for the tiny run."""
    limits = ["--max-upload-mb", "1", "--max-storage-mb", "4", "--allow-host", "m4.example.org"]
    command = [sys.executable, "-m", "m4", "demo", str(whole_run), "--port", "0", *limits]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture
def page(server):
    if CHROMIUM is None:
        pytest.skip("no browser: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(server)
        page.wait_for_selector("#generate")
        yield page
        browser.close()


def generate(page, seed: int) -> bytes:
    """Clicks the button, waits until it is done; the bytes of the depth picture."""
    page.locator("#seed input").fill(str(seed))
    page.locator("#seed input").press("Tab")
    page.locator("#generate").click()
    page.wait_for_function(f"document.querySelector('#status textarea').value == 'done, seed {seed}'")
    with urllib.request.urlopen(page.locator("#out-depth img").get_attribute("src")) as file:
        return file.read()


def test_upload_generate_and_change_the_seed(page):
    page.locator("#in-rgb canvas").first.wait_for()  # before that, a file is not taken
    page.locator("#in-rgb input[type=file]").first.set_input_files(str(ROOT / "tests/data/scene.png"))
    page.locator("#in-rgb button[aria-label='Brush Size']").wait_for()  # the picture is there
    for name in ("depth", "caption"):
        page.locator("#targets label", has_text=name).locator("input").check()
    first = generate(page, 1)
    assert page.locator("#out-caption img").is_visible() and page.locator("#out-boxes").count() == 0
    second, again = generate(page, 2), generate(page, 1)
    assert again == first != second


def test_nothing_given_is_an_error_on_the_page(page):
    page.locator("#targets label", has_text="depth").locator("input").check()
    page.locator("#generate").click()
    page.get_by_text("give at least one input").first.wait_for()


def ask(request) -> tuple[int, str]:
    """Status and text of the answer."""
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")


def status(request) -> int:
    return ask(request)[0]


def upload(server: str, data: bytes, *, name: str = "a.bin", **headers: str) -> urllib.request.Request:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    request = urllib.request.Request(f"{server}/gradio_api/upload", head.encode() + data + b"\r\n--x--\r\n")
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    for key, value in headers.items():
        request.add_header(key.replace("_", "-"), value)
    return request


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "README.md", "../../etc/passwd"])
def test_no_file_of_the_machine_is_served(server, path):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server)
    assert status(f"{server}/gradio_api/file={path}") in (403, 404)


def announced(server: str, path: str, *lines: str) -> bytes:
    """The first of the answer to a request that has sent its head alone."""
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = [f"POST /gradio_api/{path} HTTP/1.1", f"Host: {host}:{port}", *lines]
        connection.sendall(("\r\n".join(head) + "\r\n\r\n").encode())
        return connection.recv(100)


def test_large_uploads_are_refused(server):
    assert status(upload(server, bytes(2**21))) == 413  # of one file
    kind = "Content-Type: multipart/form-data; boundary=x"
    for path, length in (("upload", 5 * 2**20), ("upload", 10**15), ("queue/join", 2**23)):
        assert b" 413 " in announced(server, path, kind, f"Content-Length: {length}")
    chunks = "".join(f"{2**20:x}\r\n{'[' * 2**20}\r\n" for _ in range(5))  # of a length that is not said
    with contextlib.suppress(OSError):
        answer = announced(server, "queue/join", "Transfer-Encoding: chunked", "", chunks + "0\r\n")
        assert b" 413 " in answer or b" 400 " in answer


FOREIGN = [
    {"Host": "evil.example"},  # a name that was resolved to this machine
    {"Host": "evil.example:80"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "93.184.216.34"},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},  # a frame without an origin, a file
    {"Origin": "http://127.0.0.1:1"},  # another server of this machine
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_foreign_hosts_and_pages_are_refused(server, headers):
    """With the headers that browsers send, whatever is asked for; and nothing is stored."""
    for path, data in (("", None), ("config", None), ("gradio_api/queue/data?session_hash=x", None),
                       ("gradio_api/queue/join", b"{}"), ("gradio_api/run/predict", b"{}"), ("gradio_api/reset", b"{}"),
                       ("gradio_api/component_server", b"{}"), ("gradio_api/cancel", b"{}")):  # fmt: skip
        request = urllib.request.Request(f"{server}/{path}", data, {"Content-Type": "application/json", **headers})
        code, text = ask(request)
        assert code == 403 and ("may not use" in text or "--allow-host" in text), path
    assert status(upload(server, b"x", **headers)) == 403


def test_websockets_of_foreign_pages_are_refused():
    """Gradio has none today."""

    async def app(scope, receive, send):
        raise AssertionError("let through")

    async def send(message):
        sent.append(message)

    for headers in ({"host": "evil.example"}, {"host": "localhost", "origin": "http://evil.example"}):
        sent: list = []
        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        guard = demo_server.Guard(app, hosts=demo_server.Hosts(listens="127.0.0.1"), room=None)
        asyncio.run(guard({"type": "websocket", "path": "/", "headers": raw}, None, send))
        assert sent[0]["type"] == "websocket.close"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost"},
        {"Host": "LOCALHOST:7"},
        {"Host": "[::1]:7860"},
        {"Host": "127.0.0.2"},
        {"Host": "m4.example.org"},
        {"Host": "localhost:7", "Origin": "http://localhost:7"},
        {"Host": "m4.example.org", "Origin": "https://m4.example.org"},
        {"Origin": "https://m4.example.org"},  # a proxy that calls the page by its address
        {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},  # a link
    ],
    ids=str,
)
def test_its_own_names_and_links_to_it_are_served(server, headers):
    assert status(urllib.request.Request(server, headers=headers)) == 200


def test_uploads_have_room_and_no_more(server):
    """Small uploads go in until the room is used up; what is refused leaves nothing behind."""
    codes = [status(upload(server, bytes([i]) * 900_000)) for i in range(6)]
    assert codes == [200] * 4 + [413] * 2


def test_what_is_refused_is_read_first(server):
    """Else a client that is still sending meets a closed connection, not the reason."""
    sent = [status(upload(server, bytes([i]) * 900_000, Host="evil.example")) for i in range(20)]
    assert sent == [403] * 20


def test_old_files_make_room_for_new_ones_and_those_in_use_stay(tmp_path):
    room = demo_server.Room(tmp_path, 1000)
    for i, age in enumerate((500, 400, 300, 0)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "file").write_bytes(bytes(300))
        os.utime(tmp_path / str(i) / "file", (time.time() - age,) * 2)
    left = lambda: sorted(p.name for p in tmp_path.iterdir())  # noqa: E731
    room.tidy()
    assert left() == ["1", "2", "3"]  # the oldest went, with its folder
    assert room.reserve(400) and left() == ["2", "3"]
    assert not room.reserve(400) and left() == ["3"]  # what is in use, and what is coming, stays
    room.free(400)
    assert room.reserve(700) and not room.reserve(1)
    assert demo_server.Room(tmp_path / "missing", 10).reserve(10)


@pytest.mark.parametrize(
    "listens,host,is_own",
    [
        ("0.0.0.0", "192.168.1.7:7860", True),  # an address cannot be rebound
        ("0.0.0.0", "[fe80::1]:7860", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", socket.gethostname(), True),
        ("192.168.1.7", "192.168.1.7", True),
        ("192.168.1.7", "192.168.1.8", False),
        ("box.lan", "BOX.lan.:80", True),
        ("127.0.0.1", "127.0.0.1@evil.example", False),
        ("127.0.0.1", "[::1", False),
    ],
)
def test_names_by_what_the_page_listens_on(listens, host, is_own):
    assert (host in demo_server.Hosts(listens=listens)) == is_own


def png_header(width: int, height: int) -> bytes:
    """A picture whose header says its size, and little more."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(server):
    """Through the page's own calls: uploaded, joined to the queue, and refused before it is decoded."""
    config = json.loads(ask(f"{server}/config")[1])
    call = next(d for d in config["dependencies"] if len(d["inputs"]) > 5)
    kinds = {c["id"]: c for c in config["components"]}
    for width, height, message in ((13_000, 13_000, "exceeds limit of 64000000 pixels"), (70_000, 1000, "exceeds")):
        code, text = ask(upload(server, png_header(width, height), name="large.png"))
        assert code == 200
        file = {"path": json.loads(text)[0], "meta": {"_type": "gradio.FileData"}, "orig_name": "large.png"}
        editor = {"background": file, "layers": [], "composite": None}
        data = [editor if kinds[i]["type"] == "imageeditor" else kinds[i]["props"].get("value") for i in call["inputs"]]
        body = {"data": data, "fn_index": call["id"], "session_hash": "s1", "event_data": None, "trigger_id": None}
        join = urllib.request.Request(f"{server}/gradio_api/queue/join", json.dumps(body).encode())
        join.add_header("Content-Type", "application/json")
        assert status(join) == 200
        _, events = ask(f"{server}/gradio_api/queue/data?session_hash=s1")
        assert message in events and '"success":false' in events
