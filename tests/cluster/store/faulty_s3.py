"""An S3 server of one bucket that does to its requests what a script says.

It answers PUT, GET and HEAD of objects and HEAD of the bucket, with `If-Match`, `If-None-Match: *`
and `Range`; each request takes the next fault of the script, and is served well after its end.
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "bucket"

Fault = str
"""A name of `FAULTS`, or a code of S3 with its status: `503 SlowDown`."""

LOST = ("drop", "500 InternalError", "503 SlowDown", "502", "400 RequestTimeout", "429 TooManyReq")
"""Not applied."""
APPLIED = ("apply, drop", "apply, 500 InternalError", "apply, 503", "apply, 409 OperationAborted")
"""Applied, and the answer is lost or wrong."""
CONFLICTS = ("409 ConditionalRequestConflict", "apply, 412 PreconditionFailed")
"""What a conditional write may meet beside."""
CUT = ("cut body", "cut chunks", "no length")
"""What a read may meet beside: half a body, with and without a length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An object of the server."""

    body: bytes
    """Its content."""
    writer: str
    """Who wrote it."""

    @property
    def etag(self) -> str:
        """As S3 makes it."""
        return hashlib.md5(self.body).hexdigest()


class FaultyS3:
    """Context manager: the server runs until its end."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.script: list[Fault | Callable[[], None]] = []
        """Faults of the next requests. A callable is something that happens between requests."""
        self.requests: list[str] = []
        """Methods and keys so far."""
        self.ignored: set[str] = set()
        """Headers that the server does not know."""
        self.shortened = 0
        """How many ranges are answered without their last byte, correctly labelled."""
        self.ahead = 0.0
        """Seconds by which the server's clock is ahead."""
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """The server's URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self) -> None:
        """No objects, no script, no requests."""
        self.objects, self.script, self.requests, self.ignored = {}, [], [], set()
        self.shortened, self.ahead = 0, 0.0

    def next_fault(self) -> Fault | None:
        """What happens to this request, after all that happens before it."""
        while self.script:
            step = self.script.pop(0)
            if not callable(step):
                return step
            step()
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet: no waiting for acknowledgements
            disable_nagle_algorithm = True

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with server._lock:
                    key = self.path.partition("?")[0].removeprefix(f"/{BUCKET}").strip("/")
                    server.requests.append(f"{self.command} {key}")
                    fault = server.next_fault() or ""
                    if fault in CONFLICTS and self.command != "PUT":
                        fault = ""
                    apply, _, answer = fault.rpartition(", ")
                    if not fault or apply or fault in CUT:
                        status, code, sent, headers = server._serve(
                            self.command, key, body, self.headers
                        )
                if fault in CUT:
                    self._cut(fault, status, sent, headers)
                elif answer == "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif answer:
                    number, _, code = answer.partition(" ")
                    self._answer(int(number), code, b"", {})
                else:
                    self._answer(status, code, sent, headers)

            def handle_expect_100(self) -> bool:
                going_on = super().handle_expect_100()
                self.wfile.flush()
                return going_on

            do_PUT = do_GET = do_HEAD = _serve

            def _answer(self, status: int, code: str, body: bytes, headers: dict[str, str]) -> None:
                if code:
                    body = f"<Error><Code>{code}</Code><Message>.</Message></Error>".encode()
                self.send_response_only(status)
                self.send_header("Date", formatdate(time.time() + server.ahead, usegmt=True))
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def _cut(self, fault: str, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                half = body[: len(body) // 2]
                if fault == "cut body":
                    self.send_header("Content-Length", str(len(body)))
                elif fault == "cut chunks":
                    self.send_header("Transfer-Encoding", "chunked")
                    half = b"%x\r\n%b\r\n" % (len(half), half)
                self.end_headers()
                self.wfile.write(half)
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def _serve(
        self, method: str, key: str, body: bytes, headers: Any
    ) -> tuple[int, str, bytes, dict[str, str]]:
        """Status, code, body and headers of a request that is served well."""
        wanted = {n: headers.get(n) for n in ("If-Match", "If-None-Match", "Range")}
        wanted = {name: value for name, value in wanted.items() if name not in self.ignored}
        present = self.objects.get(key)
        if not key:
            return 200, "", b"", {}
        if present is None and (method != "PUT" or wanted.get("If-Match")):
            return 404, "NoSuchKey", b"", {}
        if present is not None and (
            wanted.get("If-None-Match") == "*"
            or wanted.get("If-Match") not in (None, f'"{present.etag}"')
        ):
            return 412, "PreconditionFailed", b"", {}
        if method == "PUT":
            present = Stored(body=body, writer=headers.get("x-amz-meta-writer", ""))
            self.objects[key] = present
            return 200, "", b"", {"ETag": f'"{present.etag}"'}
        assert present is not None
        found = {"ETag": f'"{present.etag}"', "x-amz-meta-writer": present.writer}
        if method == "HEAD":
            return 200, "", b"", {**found, "Content-Length": str(len(present.body))}
        if not wanted.get("Range"):
            return 200, "", present.body, found
        first, last = map(int, re.findall(r"\d+", wanted["Range"]))
        if first >= len(present.body):
            return 416, "InvalidRange", b"", {}
        if self.shortened:
            self.shortened, last = self.shortened - 1, last - 1
        part = present.body[first : last + 1]
        where = f"bytes {first}-{first + len(part) - 1}/{len(present.body)}"
        return 206, "", part, {**found, "Content-Range": where}
