"""An https server of weight files on this machine that can be told to misbehave."""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Request"], bool]
"""Answers a request in a way of its own and returns True, or leaves it to the server."""


class Request(BaseHTTPRequestHandler):
    """One GET; `span` is what its Range asks for."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.data: bytes = self.server.files.get(path, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.span = (int(wanted[1]), int(wanted[2]) + 1) if wanted else None
        self.server.log.append((self.path, dict(self.headers), self.span))
        if self.server.fault is not None and self.server.fault(self):
            return
        if path not in self.server.files:
            self.answer(404, b"\x1b[31mnot here, token=sekrit")
        elif self.span is None:
            self.answer(200, self.data)
        else:
            start, stop = self.span[0], min(self.span[1], len(self.data))
            self.answer(206, self.data[start:stop], start=start)

    def answer(self, status: int, body: bytes, *, start: int = 0, **headers: str) -> None:
        """Sends an answer with the headers of a decent server, but for those given here."""
        own = {
            "Content-Length": str(len(body)),
            "ETag": f'"{hashlib.sha256(self.data).hexdigest()[:16]}"',
        }
        if status == 206:
            own["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(self.data)}"
        self.send_response(status)
        for name, value in {**own, **{n.replace("_", "-"): v for n, v in headers.items()}}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(body), 1 << 16):
            try:
                self.wfile.write(body[at : at + (1 << 16)])
            except OSError:
                return
            self.server.sent += len(body[at : at + (1 << 16)])

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""


class WebServer:
    """Use as a context: serves `files` (path -> bytes) at `url`."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Request)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.files: dict[str, bytes] = {}
        self._server.files = self.files
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self._server.server_port}"
        self.reset()

    def reset(self) -> None:
        """No faults, nothing counted."""
        self._server.fault, self._server.sent, self._server.log = None, 0, []

    @property
    def sent(self) -> int:
        """Bytes of bodies."""
        return int(self._server.sent)

    @property
    def log(self) -> list[tuple[str, dict[str, str], tuple[int, int] | None]]:
        """(path with query, headers, span) of every request."""
        return list(self._server.log)

    def misbehave(self, fault: Fault | None) -> None:
        """What every request from now on is given to first."""
        self._server.fault = fault

    def __enter__(self) -> WebServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
