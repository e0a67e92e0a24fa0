"""An HTTP proxy before an S3 server: it makes requests fail, and records each one.

Which request fails follows from seed, method, key and how often that was asked before, not from
the order in which processes come. Statuses that are the real server's to give (412) are never
made up; 409 is, since the server behind it never has two writers at one moment.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

RequestFault: TypeAlias = Literal[
    "error_500", "slow_down", "late", "hang", "reset", "lost_answer", "applied_500", "applied_late",
    "conflict", "cut_body", "short_body",
]  # fmt: skip
FAULTS: Final[dict[RequestFault, float]] = {
    "error_500": 3,
    "slow_down": 3,
    "late": 2,
    "reset": 2,
    "lost_answer": 3,
    "applied_500": 2,
    "applied_late": 2,
    "conflict": 2,
    "cut_body": 2,
    "short_body": 1,
}
"""Faults of single requests by weight. `lost_answer` and `applied_500` are of requests that the
server did carry out, `applied_late` of those that it carries out long after the client gave up;
`cut_body` ends before its length, `short_body` states the shorter length."""
MOST_IN_A_ROW: Final = 3
"""Most faults of one request, however often it is repeated: what is served under these is no store
that is away, which `start_outage` is."""
_LATE_SECONDS: Final = 2.0
_APPLIED_LATE_SECONDS: Final = 20.0
_HANG_SECONDS: Final = 75.0
_STATUS: Final = {200: "OK", 409: "Conflict", 500: "Internal Server Error", 503: "Slow Down"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request and what became of it."""

    number: int
    """Its place in the order of arrival."""
    seconds: float
    """When the server answered, or the fault struck; seconds since the run began."""
    method: str
    """HTTP method."""
    path: str
    """`/bucket/key`, decoded."""
    query: str
    """Query string."""
    only_if_absent: bool
    """Whether it had `If-None-Match: *`."""
    fault: str | None
    """What the proxy did to it."""
    status: int | None
    """The real server's status; None where it never saw the request."""
    body: bytes = field(repr=False, default=b"")
    """What was sent, of requests that write."""

    @property
    def applied(self) -> bool:
        """Whether the server carried it out."""
        return self.status is not None and 200 <= self.status < 300


class FaultProxy:
    """Context manager: serves on `endpoint` from a thread of its own.

    upstream: URL of the real server.
    """

    endpoint: str
    """URL of this proxy; set on entry."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname is not None
        assert parts.port is not None
        self._upstream = (parts.hostname, parts.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._late: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self.begin(seed=0, rate=0.0)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    def begin(self, *, seed: int, rate: float) -> None:
        """Forgets what was recorded. rate: share of requests that meet one of FAULTS."""
        with self._lock:
            self._seed, self._rate = seed, rate
            self._asked: Counter[tuple[str, str]] = Counter()
            self._in_a_row: Counter[tuple[str, str]] = Counter()
            self._exchanges: list[Exchange] = []
            self._number = 0
            self._writing: dict[str, asyncio.Lock] = {}
            self._began = time.monotonic()
            self._outage: Literal["reset", "slow_down", "error_500"] | None = None
            self._failed_in_outage = False
            self.hangs = 0
            """Requests that are still to get no answer."""

    def start_outage(self, kind: Literal["reset", "slow_down", "error_500"]) -> None:
        """From now on every request fails."""
        self._failed_in_outage = False
        self._outage = kind

    def stop_outage(self) -> bool:
        """Ends an outage; whether any request failed in it."""
        self._outage = None
        return self._failed_in_outage

    def hang_next(self, requests: int) -> None:
        """The next requests get no answer for longer than a client waits."""
        with self._lock:
            self.hangs += requests

    def settle(self) -> None:
        """Returns once everything that is to be applied late has been."""
        while self._late:
            time.sleep(0.1)

    def exchanges(self, *, answered: bool = False) -> list[Exchange]:
        """What was asked since `begin`, in order of arrival. answered: in the order in which the
        server carried it out instead."""
        with self._lock:
            found = list(self._exchanges)
        return found if answered else sorted(found, key=lambda exchange: exchange.number)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await _read_request(reader, writer)) is not None:
                if not await self._answer(request, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, or the proxy is closing
        finally:
            writer.transport.abort() if writer.is_closing() else writer.close()

    async def _answer(self, request: _Request, writer: asyncio.StreamWriter) -> bool:
        """Answers one request, or not; whether the connection may be used again."""
        number, fault = self._decide(request)
        status: int | None = None
        response = b""
        if fault == "late":
            await asyncio.sleep(_share(self._seed, request, "late") * _LATE_SECONDS)
        if fault == "hang":
            self._record(request, number, fault, None)
            await asyncio.sleep(_HANG_SECONDS)
        elif fault == "applied_late":
            late = asyncio.create_task(self._apply_late(request, number))
            self._late.add(late)
            late.add_done_callback(self._late.discard)
        elif fault in (None, "late", "lost_answer", "applied_500", "cut_body", "short_body"):
            status, response = await self._apply(request, number, fault)
            fault = fault if status is not None else "upstream_gone"
        else:
            self._record(request, number, fault, None)
        if fault in ("error_500", "applied_500"):
            writer.write(_error(request, 500, "InternalError"))
        elif fault == "slow_down":
            writer.write(_error(request, 503, "SlowDown"))
        elif fault == "conflict":
            writer.write(_error(request, 409, "ConditionalRequestConflict"))
        elif fault in ("reset", "lost_answer", "applied_late", "hang", "upstream_gone"):
            writer.transport.abort()
            return False
        elif fault in ("cut_body", "short_body"):
            writer.write(_shorten(response, restate=fault == "short_body"))
            await writer.drain()
            return fault == "short_body"
        else:
            writer.write(response)
        await writer.drain()
        return True

    async def _apply(
        self, request: _Request, number: int, fault: str | None
    ) -> tuple[int | None, bytes]:
        """The real server's status and response, and the record of them; (None, b"") where it is
        gone."""
        # The server behind checks a condition first and writes then, so two writers of one key
        # could both succeed there. S3 lets one of them.
        async with self._writing.setdefault(request.path, asyncio.Lock()):
            try:
                status, response = await self._forward(request)
            except OSError:
                self._record(request, number, "upstream_gone", None)
                return None, b""
            self._record(request, number, fault, status)
            return status, response

    async def _apply_late(self, request: _Request, number: int) -> None:
        run = self._began
        await asyncio.sleep(_share(self._seed, request, "late") * _APPLIED_LATE_SECONDS)
        if run == self._began:  # else it is another run's store by now
            await self._apply(request, number, "applied_late")

    async def _forward(self, request: _Request) -> tuple[int, bytes]:
        """The real server's status and whole response."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request.head_for_upstream() + request.body)
            await writer.drain()
            raw = await reader.read()
        finally:
            writer.close()
        if not raw.startswith(b"HTTP/"):
            raise ConnectionError("the server closed the connection")
        return int(raw.split(b" ", 2)[1]), _keep_alive(raw)

    def _decide(self, request: _Request) -> tuple[int, str | None]:
        """The request's number, and its fault."""
        name = (request.method, request.target)
        with self._lock:
            number = self._number
            self._number += 1
            self._asked[name] += 1
            if self.hangs:
                self.hangs -= 1
                return number, "hang"
            if self._outage is not None:
                self._failed_in_outage = True
                return number, self._outage
            fault = None
            if _share(self._seed, request, self._asked[name]) < self._rate:
                fault = self._choose(request, self._asked[name])
            if self._in_a_row[name] >= MOST_IN_A_ROW:
                fault = None
            self._in_a_row[name] = 0 if fault in (None, "late") else self._in_a_row[name] + 1
            return number, fault

    def _choose(self, request: _Request, asked: int) -> str | None:
        """One of the faults that such a request can meet; None where there is none."""
        weights = dict(FAULTS)
        if not request.only_if_absent:
            del weights["conflict"], weights["applied_late"]
        if request.method != "GET":
            del weights["cut_body"], weights["short_body"]
        if not any(weights.values()):
            return None
        draw = random.Random(_share(self._seed, request, "kind", asked))
        return draw.choices(list(weights), list(weights.values()))[0]

    def _record(
        self, request: _Request, number: int, fault: str | None, status: int | None
    ) -> None:
        writes = request.method in ("PUT", "POST", "DELETE")
        exchange = Exchange(
            number=number,
            seconds=time.monotonic() - self._began,
            method=request.method,
            path=request.path,
            query=request.query,
            only_if_absent=request.only_if_absent,
            fault=fault,
            status=status,
            body=request.body if writes else b"",
        )
        with self._lock:
            self._exchanges.append(exchange)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    method: str
    target: str
    headers: dict[str, tuple[str, str]]
    body: bytes

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def only_if_absent(self) -> bool:
        return self.headers.get("if-none-match", ("", ""))[1] == "*"

    def head_for_upstream(self) -> bytes:
        """One request to a connection, which the server then closes."""
        dropped = ("connection", "expect", "proxy-connection")
        lines = [f"{self.method} {self.target} HTTP/1.1", "Connection: close"]
        lines += [f"{a}: {b}" for name, (a, b) in self.headers.items() if name not in dropped]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> _Request | None:
    """The next request of a connection; None at its end."""
    head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
    if not head:
        return None
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = (name.strip(), value.strip())
    if headers.get("expect", ("", ""))[1].lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
    if "chunked" in headers.get("transfer-encoding", ("", ""))[1].lower():
        body = await _read_chunks(reader)
    else:
        body = await reader.readexactly(int(headers.get("content-length", ("", "0"))[1]))
    return _Request(method=method, target=target, headers=headers, body=body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """A chunked body as it came, chunk headers and all: it is forwarded as it is."""
    raw = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        raw += line + await reader.readexactly(size + 2)
        if size == 0:
            return raw


def _share(seed: int, request: _Request, *more: object) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    # A listing's token and the order of its arguments are no part of what is asked for.
    prefix = parse_qs(request.query).get("prefix", [""])[0]
    text = repr((seed, request.method, request.path, prefix, more))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56


def _error(request: _Request, status: int, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    sent = b"" if request.method == "HEAD" else body.encode()
    head = (
        f"HTTP/1.1 {status} {_STATUS[status]}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(sent)}\r\n\r\n"
    )
    return head.encode() + sent


def _keep_alive(raw: bytes) -> bytes:
    """The response without the server's word that it closes the connection."""
    head, mark, body = raw.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    version, _, rest = lines[0].partition(b" ")
    lines[0] = b"HTTP/1.1 " + rest if version == b"HTTP/1.0" else lines[0]
    return b"\r\n".join(lines) + mark + body


def _shorten(response: bytes, *, restate: bool) -> bytes:
    """The response with the first half of its body. restate: with that half's length as its
    Content-Length; else the length stays, and the connection ends before it."""
    head, mark, body = response.partition(b"\r\n\r\n")
    half = body[: len(body) // 2]
    if restate:
        lines = [
            b"Content-Length: %d" % len(half)
            if line.lower().startswith(b"content-length:")
            else line
            for line in head.split(b"\r\n")
        ]
        head = b"\r\n".join(lines)
    return head + mark + half
