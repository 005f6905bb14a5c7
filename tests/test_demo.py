"""`python -m m4 demo` in a real browser: upload, generate, change the seed; what must not be served is not."""

import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, environment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(whole_run):
    """The address of a page for the tiny run."""
    command = [sys.executable, "-m", "m4", "demo", str(whole_run), "--port", "0", "--max-upload-mb", "1"]
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


def status(request) -> int:
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "README.md", "../../etc/passwd"])
def test_no_file_of_the_machine_is_served(server, path):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server)
    assert status(f"{server}/gradio_api/file={path}") in (403, 404)


def test_large_uploads_are_refused(server):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
        + bytes(2**21)
        + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(f"{server}/gradio_api/upload", body)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    assert status(request) == 413
