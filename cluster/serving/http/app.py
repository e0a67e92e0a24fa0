"""The HTTP edge: OpenAI's chat completions in front of the replicas, with priority over batch rows.

Bodies and images are bounded before they are parsed or decoded; image URLs are fetched from where
the endpoint allows it, which is nowhere by default. Errors have OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from cluster.controller import list_runs
from cluster.errors import ApiError, ImageTooLarge, InferenceFailed, PruningNoEffect, UsageError
from cluster.logs import configure_logs
from cluster.protocol import LabelRequest, Priority, StreamingReplicas
from cluster.serving.client import REPLICA_FULL, REPLICA_GONE, ServeReplicas
from cluster.serving.http.api_keys import ApiKeys
from cluster.serving.http.chat_request import RequestRules, label_requests, parse_chat_request
from cluster.serving.http.completion import completion, usage
from cluster.serving.http.edge_rules import REQUEST_ID, EdgeRules
from cluster.serving.http.image_fetch import ImageFetcher
from cluster.serving.http.openapi import describe
from cluster.serving.http.page_files import add_page
from cluster.serving.http.request_body import BodyRoom
from cluster.serving.http.sse import HEADERS, merge, stream_events, wait_for_first
from cluster.serving.online_calibration import OnlineBreakEven, calibrate_online
from sppruner.engine.interface import Result

logger = structlog.get_logger(__name__)

_UNAVAILABLE = (*REPLICA_FULL, *REPLICA_GONE)
_SERVER_FAULTS = (InferenceFailed.code, PruningNoEffect.code)
_PARAMETERS: Final = {"prompt": "messages", "spec": "prune", "format": "response_format"}
# Concurrent requests in calibration at most: an endpoint must start in time.
_FULL_LOAD = 64
# Until a replica must have said something for the endpoint to be ready.
_READY_SECONDS: Final = 2.0
_ANSWERED_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings(RequestRules):
    """What the edge allows."""

    auto: bool = False
    """Apply `default_spec` only where it was measured to be faster than dense."""
    replicas: int = 1
    """Replicas that share the requests."""
    max_body_bytes: int = 64 * 2**20
    """Longest request body."""
    max_held_bytes: int = 512 * 2**20
    """Bodies of all requests at the same time."""
    max_requests: int = 128
    """Requests at the same time; more are told to ask again. With many replicas it is more."""
    hosts: tuple[str, ...] = ()
    """Names under which the endpoint may be asked, beside localhost and addresses; "*" for any."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that may ask, beside the endpoint's own; "*" for any."""
    fetch: tuple[str, ...] = ()
    """Prefixes of URLs (https://, s3://) from which images are fetched; none by default."""
    keys: str | None = None
    """Path or s3:// URI of the file of API keys; None for none, and then for this machine alone."""
    public: bool = False
    """Whether other machines may ask where there are no keys."""
    access_log: bool = False
    """Whether each request leaves a line in the log."""

    def __post_init__(self) -> None:
        if self.auto and self.default_spec.is_dense:
            raise UsageError("auto chooses between a method and none: name a method")


class OngoingRequests:
    """How many requests are in progress, and when the last was answered."""

    def __init__(self, most: int) -> None:
        self.count = 0
        self.answered = -float("inf")
        """By the monotonic clock."""
        self._most = most

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts one request for the length of the block. Raises ApiError where there are too
        many."""
        if self.count >= self._most:
            raise ApiError("overloaded, ask again", status=503, code="overloaded")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


class Api:
    """The Serve ingress. It waits for a replica, which tells it the model's name, and with `auto`
    measures where pruning pays."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(  # type: ignore[misc]
        self, handle: DeploymentHandle[Any], settings: ApiSettings
    ) -> None:
        configure_logs()
        stats = await handle.stats.remote()
        replicas, break_even = ServeReplicas(handle), None
        if settings.auto:
            load = min(stats.slots, _FULL_LOAD)
            break_even = await calibrate_online(replicas, settings.default_spec, full_load=load)
        keys = None
        if settings.keys is not None:
            keys = await asyncio.to_thread(ApiKeys.open, settings.keys)
        self._app = create_app(
            replicas, settings, model=stats.model, break_even=break_even, keys=keys
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def create_app(
    replicas: StreamingReplicas,
    settings: ApiSettings,
    *,
    model: str,
    break_even: OnlineBreakEven | None = None,
    keys: ApiKeys | None = None,
) -> FastAPI:
    """The endpoint of one model. Needs Ray for /v1/runs alone.

    break_even: where pruning pays, for requests that name none; None applies the default spec.
    keys: of which one is needed for all that is not of this machine's health.
    """
    app = FastAPI(title="sppruner", docs_url=None, redoc_url=None)
    started = int(time.time())
    ongoing = OngoingRequests(settings.max_requests)
    room = BodyRoom(settings.max_held_bytes)
    fetcher = ImageFetcher(settings.fetch, settings.media) if settings.fetch else None
    card: dict[str, Any] = {
        "id": model,
        "object": "model",
        "created": started,
        "owned_by": "sppruner",
    }
    if break_even is not None:
        card["break_even"] = break_even.to_list()
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    app.add_middleware(
        EdgeRules, hosts=settings.hosts, origins=settings.origins, log=settings.access_log
    )
    describe(app, keys=keys is not None)

    async def authorised(request: Request) -> None:
        state = request.scope["state"]
        if keys is not None:
            state["holder"] = await keys.holder(request.headers.get("authorization"))
            state["noted"]["key"] = state["holder"].key.name
        elif not settings.public and not _is_loopback(request.scope.get("server")):
            raise ApiError(
                "this endpoint has no API keys, so it answers its own machine alone: start it with "
                "keys=FILE, or with public=true where everybody who can reach it may use it",
                status=403,
                code="keys_required",
            )

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(authorised)])

    @app.exception_handler(ApiError)
    async def answer_error(_: Request, error: ApiError) -> Response:
        headers = {}
        if error.status in (429, 503):
            headers["Retry-After"] = str(math.ceil(error.retry_after))
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return await answer_error(request, ApiError(message, status=error.status_code))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process answers. Whether a model does is /readyz's to say."""
        return {"status": "ok", "model": model}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether a request would be answered now."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await replicas.stats()
        except REPLICA_FULL:
            pass  # it answers, though others
        except (*REPLICA_GONE, TimeoutError) as error:
            if time.monotonic() - ongoing.answered > _ANSWERED_SECONDS:
                raise ApiError("no replica answers", status=503, code="not_ready") from error
        return {"status": "ready", "model": model}

    @v1.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @v1.get("/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        check_model(name)
        return card

    @v1.get("/runs")
    async def runs() -> dict[str, Any]:
        """What the run controller knows of batch runs on this cluster."""
        return {"object": "list", "data": [asdict(run) for run in await list_runs()]}

    @v1.post("/chat/completions")
    async def chat(request: Request) -> Response:
        state = request.scope["state"]
        if (holder := state.get("holder")) is not None:
            state["closing"].enter_context(holder.request())
            noted = state["noted"]
            state["closing"].callback(
                lambda: holder.used(noted.get("total_tokens", noted.get("streamed", 0)))
            )
        body = state["closing"].enter_context(room.held())
        chat_request = parse_chat_request(await body.read(request, settings.max_body_bytes))
        check_model(chat_request.model)
        asked = await label_requests(
            chat_request, settings, id=state["request_id"], fetcher=fetcher
        )
        if (
            break_even is not None
            and chat_request.prune is None
            and asked[0].spec == settings.default_spec
        ):
            load = max(1.0, (ongoing.count + 1) / settings.replicas)
            spec = break_even.spec(asked[0].spec, asked[0].images, load)
            asked = [replace(one, spec=spec) for one in asked]
        envelope = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        state["noted"]["completion"] = envelope["id"]
        if chat_request.stream:
            pieces = merge([_stream(replicas, one, ongoing) for one in asked])
            state["closing"].push_async_callback(pieces.aclose)
            events = stream_events(
                envelope,
                await wait_for_first(pieces),
                choices=len(asked),
                with_usage=chat_request.wants_usage_chunk,
                report=chat_request.wants_report,
                noted=state["noted"],
            )
            state["closing"].push_async_callback(events.aclose)
            return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)
        results = await _label(replicas, asked, ongoing)
        state["noted"] |= usage(results)
        answer = completion(
            envelope,
            results,
            report=chat_request.wants_report,
            logprobs=bool(chat_request.logprobs),
        )
        return JSONResponse(answer)

    def check_model(name: str) -> None:
        if name != model:
            raise ApiError(
                f"model {name!r} is not served here: use {model!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    app.include_router(v1)
    add_page(app)
    return app


def _is_loopback(server: Sequence[Any] | None) -> bool:
    """Whether a connection came to an address that only its own machine reaches."""
    address = str(server[0]) if server else ""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address in ("localhost", "")


async def _label(
    replicas: StreamingReplicas, asked: Sequence[LabelRequest], ongoing: OngoingRequests
) -> list[Result]:
    with _unavailable_as_503(), ongoing.counted():
        results = await replicas.label(asked, priority=Priority.ONLINE)
        ongoing.answered = time.monotonic()
    return [_checked(result) for result in results]


async def _stream(
    replicas: StreamingReplicas, request: LabelRequest, ongoing: OngoingRequests
) -> AsyncGenerator[str | Result]:
    with _unavailable_as_503(), ongoing.counted():
        async with aclosing(replicas.stream(request)) as pieces:
            async for piece in pieces:
                ongoing.answered = time.monotonic()
                yield piece if isinstance(piece, str) else _checked(piece)


@contextmanager
def _unavailable_as_503() -> Iterator[None]:
    try:
        yield
    except _UNAVAILABLE as error:
        logger.warning("request_shed", error=type(error).__name__)
        raise ApiError("overloaded, ask again", status=503, code="overloaded") from error


def _checked(result: Result) -> Result:
    """The result, if it is an answer. Raises ApiError for an error result."""
    if result.error_code is None:
        return result
    message = result.error_message or result.error_code
    if result.error_code in _SERVER_FAULTS:
        logger.error("request_failed", error=message)
        raise ApiError("the model failed on this request", status=500, code=result.error_code)
    status = 413 if result.error_code == ImageTooLarge.code else 400
    param = _PARAMETERS[result.error_about or "prompt"]
    raise ApiError(message, status=status, code=result.error_code, param=param)
