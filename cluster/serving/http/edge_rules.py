"""What holds for every request, whatever its path: who may ask, its id, and a line in the log.

A web page that somebody opens may send requests to services on the same machine, also under a name
of its own that it lets point there (DNS rebinding). So a request under a name that is not known is
refused, and one that a page of another origin sent, unless that origin is allowed.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Collection
from contextlib import AsyncExitStack
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ApiError

logger = structlog.get_logger(__name__)

REQUEST_ID: Final = "x-request-id"
ANY: Final = "*"
"""As a host or an origin: every one."""
_NAMES: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Asked every few seconds by whoever watches the process.
_UNLOGGED: Final = frozenset({"/healthz", "/readyz"})


class EdgeRules:
    """ASGI middleware, the outermost. HEAD is answered as GET without a body. In a request's state:
    `request_id`; `noted`, what its line in the log shall hold; `closing`, a stack of what ends with
    its response.

    hosts: names under which the endpoint may be asked, beside localhost and addresses; "*" for any.
    origins: of pages that may ask, beside the endpoint's own; "*" for any. log: whether each
    request leaves a line in the log, of level info; else debug.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        log: bool = True,
    ) -> None:
        self._app = app
        self._level = logging.INFO if log else logging.DEBUG
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _NAMES.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})
        noted: dict[str, Any] = {}
        closing = AsyncExitStack()
        scope["state"] |= {"request_id": request_id, "noted": noted, "closing": closing}
        started, status = time.perf_counter(), 0
        without_body = scope["method"] == "HEAD"

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            elif without_body and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                self._check(headers)
            except ApiError as error:
                refused = JSONResponse(error.body(), status_code=error.status)
                await refused(scope, receive, send_on)
            else:
                inner = {**scope, "method": "GET"} if without_body else scope
                try:
                    await self._app(inner, receive, send_on)
                except Exception as error:
                    logger.error("request_failed", path=scope["path"], exc_info=error)
                    if status:
                        raise  # half of a response is out: the connection ends
                    fault = ApiError("internal error", status=500, code="internal")
                    await JSONResponse(fault.body(), status_code=500)(scope, receive, send_on)
            finally:
                await closing.aclose()
                if scope["path"] not in _UNLOGGED:
                    logger.log(
                        self._level,
                        "request",
                        method=scope["method"],
                        path=scope["path"],
                        status=status,
                        seconds=round(time.perf_counter() - started, 4),
                        **noted,
                    )

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = _name(host)
        if ANY not in self._hosts and not _is_own(name) and name not in self._hosts:
            raise ApiError(
                f"host {name!r} is not known here: start the endpoint with hosts={name or 'NAME'}",
                status=421,
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is None or ANY in self._origins or origin in self._origins:
            return
        try:
            place = urlsplit(origin).netloc.lower()
        except ValueError:
            place = ""
        if place != host.lower():
            raise ApiError(
                f"origin {origin!r} is not allowed here: start the endpoint with origins={origin}",
                status=403,
                code="origin_not_allowed",
            )


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return host.lower()


def _is_own(name: str) -> bool:
    """Whether no other party's name service can make browsers ask under this name."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
