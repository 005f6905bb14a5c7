"""Who may use the demo's page, and how much: hosts, origins, sizes of requests, room on disk, pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import socket
import threading
import time
import warnings
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.components.base import server
from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m4.data.sources.pictures import MAX_PIXELS

MAX_MESSAGE = 2**22  # bytes of a request that uploads nothing: texts, boxes, settings
MAX_LAYERS = 4  # of an image that is painted on; the page uses one
MAX_PENDING = 4  # images that pages sent and did not use yet; Gradio holds them in memory
IN_USE = 60  # seconds for which a file is not removed
UPLOADS = ("/upload", "/component_server")  # ends of paths
EVERY_ADDRESS = ("", "0.0.0.0", "::")


# ---- Hosts and origins ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Names under which the page is used: loopback, the address it listens on, and those that are allowed besides.

    Another name in a browser's request is one that a foreign site resolved to this machine (DNS rebinding). A page that
    listens on every address accepts any address, which cannot be rebound, and the machine's own name.
    """

    listens: str
    """Address that the page listens on."""
    allowed: tuple[str, ...] = ()
    """Other names under which it may be used; () is none."""

    def __contains__(self, host: str) -> bool:
        """Whether a Host header, or an Origin without its "https://", is of this page."""
        name = _name(host)
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            address = None
        every = _name(self.listens) in EVERY_ADDRESS
        if address is not None and (every or address.is_loopback):
            return True
        own = {"localhost", _name(self.listens), *map(_name, self.allowed)}
        return name != "" and name in own | ({socket.gethostname().lower()} if every else set())

    def refusal(self, scope: Scope) -> str:
        """Why a request is refused, or "". A foreign page may link to this one, and do nothing else with it."""
        headers = Headers(scope=scope)
        host = headers["host"] if "host" in headers else ""
        if host not in self:
            return f"this page is not called {ascii(host)[:100]}; allow the name with --allow-host"
        if "origin" in headers:
            origin = headers["origin"].partition("://")[2]
            if origin.lower() != host.lower() and _name(origin) not in map(_name, self.allowed):
                return f"a page of {ascii(headers['origin'])[:100]} may not use this one"
        elif "sec-fetch-site" in headers and headers["sec-fetch-site"] not in ("same-origin", "none"):
            fetch = [headers[f"sec-fetch-{k}"] if f"sec-fetch-{k}" in headers else "" for k in ("mode", "dest")]
            method = scope["method"] if "method" in scope else ""
            if fetch != ["navigate", "document"] or method not in ("GET", "HEAD") or "/gradio_api" in scope["path"]:
                return "another page may not use this one"
        return ""


def _name(host: str) -> str:
    """The name or address of a host with or without a port; "" if there is none."""
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


# ---- Room -----------------------------------------------------------------------------------------------------------


class Room:
    """A folder of uploads and results of at most `max_bytes`: the oldest files are deleted, those in use stay."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes, self.reserved, self.lock = folder, max_bytes, 0, threading.Lock()

    def reserve(self, num_bytes: int) -> bool:
        """Reserves bytes for an upload, by deleting old files; False if there are too few. `free` releases them."""
        with self.lock:
            if not self._delete_old_files(num_bytes):
                return False
            self.reserved += num_bytes
            return True

    def free(self, num_bytes: int) -> None:
        with self.lock:
            self.reserved -= num_bytes

    def tidy(self) -> None:
        """Deletes old files beyond `max_bytes`."""
        with self.lock:
            self._delete_old_files(0)

    def _delete_old_files(self, num_bytes: int) -> bool:
        files = []
        for path in self.folder.rglob("*"):
            try:
                status = path.lstat()
            except OSError:  # deleted meanwhile
                continue
            if not path.is_dir():
                files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) + self.reserved + num_bytes - self.max_bytes
        for changed, size, path in sorted(files):
            if excess <= 0 or changed > time.time() - IN_USE:
                break
            path.unlink(missing_ok=True)
            excess -= size
            if path.parent != self.folder:
                with contextlib.suppress(OSError):  # not empty
                    path.parent.rmdir()
        return excess <= 0


# ---- Requests -------------------------------------------------------------------------------------------------------


class Guard:
    """ASGI middleware: refuses foreign hosts and origins, and requests that are too large or find no room."""

    def __init__(self, app: ASGIApp, *, hosts: Hosts, room: Room):
        self.app, self.hosts, self.room = app, hosts, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        refused = self.hosts.refusal(scope)
        if refused and scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008, "reason": refused})
        is_upload = scope["path"].rstrip("/").endswith(UPLOADS)
        limit = _length(Headers(scope=scope), self.room.max_bytes if is_upload else MAX_MESSAGE)
        body = _Body(receive, limit)
        send = body.read_before_errors(send)
        if refused:
            return await PlainTextResponse(refused, status_code=403)(scope, body, send)
        if limit < 0:
            return await PlainTextResponse("the request is too large", status_code=413)(scope, body, send)
        reserved = limit if is_upload else 0
        if not self.room.reserve(reserved):
            full = f"uploads and results may take {self.room.max_bytes >> 20} MiB, which are in use; try again later"
            return await PlainTextResponse(full, status_code=413)(scope, body, send)
        try:
            await self.app(scope, body, _unframed(send))
        finally:
            self.room.free(reserved)


def _length(headers: Headers, most: int) -> int:
    """Bytes that a request may send: its content length, else `most`; -1 if that is more."""
    if "content-length" not in headers:
        return most
    length = headers["content-length"]
    return int(length) if length.isdecimal() and len(length) < 20 and int(length) <= most else -1


class _Body:
    """The body of a request, `limit` bytes at most."""

    def __init__(self, receive: Receive, limit: int):
        self.receive, self.limit, self.num_bytes, self.is_read = receive, limit, 0, False

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.num_bytes += len(message["body"]) if "body" in message else 0
            self.is_read = not message.get("more_body", False)  # ASGI: false by default
            if self.num_bytes > self.limit:
                raise HTTPException(413, "the request is too large")
        else:
            self.is_read = True  # the client has disconnected
        return message

    def read_before_errors(self, send: Send) -> Send:
        """Reads the whole body before an error is sent: a client that is still sending would see a closed connection,
        and never read why it was refused."""

        async def after_the_body(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                with contextlib.suppress(HTTPException):
                    while not self.is_read and self.num_bytes <= self.limit:
                        await self()
            await send(message)

        return after_the_body


def _unframed(send: Send) -> Send:
    """Forbids foreign pages to show this one in a frame (clickjacking)."""

    async def with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            MutableHeaders(scope=message)["X-Frame-Options"] = "SAMEORIGIN"
        await send(message)

    return with_header


# ---- Pictures -------------------------------------------------------------------------------------------------------


def refuse_large_pictures() -> None:
    """Refuses every image that this process opens with too many pixels in its header: Gradio decodes uploads itself."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # PIL warns above this number, and refuses above twice of it
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def bounded(editor: gr.ImageEditor) -> gr.ImageEditor:
    """An editor that holds few images that pages sent, and accepts few layers; Gradio's own accepts any number."""
    accept, preprocess = editor.accept_blobs, editor.preprocess

    @server
    def accept_blobs(data: Any) -> None:
        index = str(data.data["index"])
        if index not in ("", "null", "None") and not 0 <= int(index) < MAX_LAYERS:
            raise HTTPException(413, f"a picture has at most {MAX_LAYERS} layers")
        for old in [*editor.blob_storage][: 1 - MAX_PENDING or None]:
            if len(editor.blob_storage) >= MAX_PENDING and old != data.data["id"]:
                editor.blob_storage.pop(old, None)
        accept(data)

    def preprocess_few(payload: Any) -> Any:
        if payload is not None and len(payload.layers) > MAX_LAYERS:
            raise gr.Error(f"a picture of {len(payload.layers)} layers was given; allowed: {MAX_LAYERS}")
        return preprocess(payload)

    editor.accept_blobs, editor.preprocess = accept_blobs, preprocess_few
    return editor


def check_hosts(names: Seq[str]) -> tuple[str, ...]:
    for name in names:
        if not _name(name) or "/" in name or "*" in name:
            raise ValueError(f"--allow-host {name!r} must be a name such as m4.example.org")
    return tuple(names)


def keep_temporary_files_in(folder: Path) -> None:
    """Puts temporary files of this process, Gradio's included, into a folder whose size is limited."""
    import tempfile

    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = str(folder)
