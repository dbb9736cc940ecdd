"""A web server on localhost that can misbehave in the ways that servers and lines do."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Page:
    """A file as the server gives it.

    Attributes:
        etag, last_modified: sent where not empty.
        ranges: whether parts are given; otherwise every answer is the whole file.
        heeds_conditions: whether If-Range is looked at.
        states_length: whether Content-Length is sent.
        cuts: after how many bytes of its body each answer is cut off, answer by answer; whole once they are used up.
        statuses: sent instead of the file, answer by answer; the file once they are used up.
        stall: an answer stops half-way and the line stays open, this many times.
        move: called before each answer, to change the file meanwhile.
        redirect: path to go to instead.
    """

    content: bytes = b""
    etag: str = ""
    last_modified: str = ""
    content_type: str = "application/octet-stream"
    ranges: bool = True
    heeds_conditions: bool = True
    states_length: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    stall: int = 0
    move: Callable[["Page"], None] = lambda page: None
    redirect: str = ""
    asked: list[dict[str, str]] = field(default_factory=list)
    """Headers of the requests so far."""


class Web:
    """Pages by path, and the address of the server."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.address = ""
        self.closing = threading.Event()

    def put(self, path: str, content: bytes, **how: Any) -> Page:
        self.pages[path] = Page(content, **how)
        return self.pages[path]

    def url(self, path: str) -> str:
        return self.address + path


@contextmanager
def serving() -> Iterator[Web]:
    """A server for the time of the block."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path in web.pages else 404)
            self.end_headers()

        def do_GET(self) -> None:
            page = web.pages.get(self.path)
            if page is None:
                self.send_error(404)
            else:
                _answer(self, page, web)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(handler: BaseHTTPRequestHandler, page: Page, web: Web) -> None:
    page.asked.append(dict(handler.headers))
    if page.statuses:
        handler.send_error(page.statuses.pop(0))
        return
    page.move(page)
    if page.redirect:
        handler.send_response(302)
        handler.send_header("Location", page.redirect)
        handler.end_headers()
        return
    body = _head(handler, page)
    if page.stall:
        page.stall -= 1
        handler.wfile.write(body[: len(body) // 2])
        web.closing.wait(10)
    else:
        handler.wfile.write(body[: page.cuts.pop(0)] if page.cuts else body)


def _head(handler: BaseHTTPRequestHandler, page: Page) -> bytes:
    """Sends status and headers; returns what belongs into the body."""
    begin = 0
    wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    is_same = handler.headers.get("If-Range") in (None, page.etag, page.last_modified)
    if wanted and page.ranges and (is_same or not page.heeds_conditions):
        begin = int(wanted[1])
        if begin >= len(page.content):
            handler.send_error(416)
            return b""
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {begin}-{len(page.content) - 1}/{len(page.content)}")
    else:
        handler.send_response(200)
    body = page.content[begin:]
    headers = {"ETag": page.etag, "Last-Modified": page.last_modified, "Content-Type": page.content_type}
    if page.states_length:
        headers["Content-Length"] = str(len(body))
    for name, value in headers.items():
        if value:
            handler.send_header(name, value)
    handler.end_headers()
    return body
