"""The HTTP edge: OpenAI's chat completions in front of the replicas, with priority over batch rows.

Bodies and images are bounded before they are parsed or decoded; image URLs are never fetched.
Errors have OpenAI's shape.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from cluster.config import MediaLimits
from cluster.controller import list_runs
from cluster.errors import ApiError, ImageTooLarge, InferenceFailed, PruningNoEffect, UsageError
from cluster.protocol import LabelRequest, Priority, Replicas, StreamingReplicas
from cluster.serving.client import REPLICA_FULL, REPLICA_GONE, ServeReplicas
from cluster.serving.http.openai_schema import ChatRequest, image_bytes, usage
from cluster.serving.http.sse import stream_events, wait_for_first
from cluster.serving.online_calibration import OnlineBreakEven, calibrate_online
from sppruner.engine.interface import Result
from sppruner.spec import DENSE, PruneSpec

logger = structlog.get_logger(__name__)

_UNAVAILABLE = (*REPLICA_FULL, *REPLICA_GONE)
_SERVER_FAULTS = (InferenceFailed.code, PruningNoEffect.code)
_RETRY_AFTER_SECONDS = "1"
# Concurrent requests in calibration at most: an endpoint must start in time.
_FULL_LOAD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """What the edge allows."""

    default_spec: PruneSpec = DENSE
    """The pruning of requests that name none."""
    auto: bool = False
    """Apply `default_spec` only where it was measured to be faster than dense."""
    replicas: int = 1
    """Replicas that share the requests."""
    media: MediaLimits = field(default_factory=MediaLimits)
    """Limits of one image."""
    max_body_bytes: int = 64 * 2**20
    """Longest request body."""
    max_images: int = 8
    """Images of one request."""
    default_tokens: int = 256
    """Longest answer where the request names no limit."""
    most_tokens: int = 2048
    """Longest answer that a request may name."""

    def __post_init__(self) -> None:
        if self.auto and self.default_spec.is_dense:
            raise UsageError("auto chooses between a method and none: name a method")


class OngoingRequests:
    """How many requests are in progress."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts one request for the length of the block."""
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
        stats = await handle.stats.remote()
        replicas, break_even = ServeReplicas(handle), None
        if settings.auto:
            load = min(stats.slots, _FULL_LOAD)
            break_even = await calibrate_online(replicas, settings.default_spec, full_load=load)
        self._app = create_app(replicas, settings, model=stats.model, break_even=break_even)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def create_app(
    replicas: StreamingReplicas,
    settings: ApiSettings,
    *,
    model: str,
    break_even: OnlineBreakEven | None = None,
) -> FastAPI:
    """The endpoint of one model. Needs Ray for /v1/runs alone.

    break_even: where pruning pays, for requests that name none; None applies the default spec.
    """
    app = FastAPI(title="sppruner", docs_url=None, redoc_url=None)
    started = int(time.time())
    ongoing = OngoingRequests()

    @app.exception_handler(ApiError)
    async def answer_error(_: Request, error: ApiError) -> Response:
        headers = {"Retry-After": _RETRY_AFTER_SECONDS} if error.status == 503 else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return await answer_error(request, ApiError(message, status=error.status_code))

    @app.exception_handler(Exception)
    async def answer_fault(request: Request, error: Exception) -> Response:
        logger.error("request_failed", path=request.url.path, exc_info=error)
        return await answer_error(request, ApiError("internal error", status=500, code="internal"))

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "model": model}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card: dict[str, Any] = {
            "id": model,
            "object": "model",
            "created": started,
            "owned_by": "sppruner",
        }
        if break_even is not None:
            card["break_even"] = break_even.to_list()
        return {"object": "list", "data": [card]}

    @app.get("/v1/runs")
    async def runs() -> dict[str, Any]:
        """What the run controller knows of batch runs on this cluster."""
        return {"object": "list", "data": [asdict(run) for run in await list_runs()]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        chat_request = ChatRequest.parse(await _read_body(request, settings.max_body_bytes))
        if chat_request.model != model:
            raise ApiError(
                f"model {chat_request.model!r} is not served here: use {model!r}",
                status=404,
                code="model_not_found",
                param="model",
            )
        label_request = _label_request(chat_request, settings)
        if break_even is not None and chat_request.prune is None:
            load = max(1.0, (ongoing.count + 1) / settings.replicas)
            spec = break_even.spec(label_request.spec, label_request.images, load)
            label_request = replace(label_request, spec=spec)
        envelope = {
            "id": f"chatcmpl-{label_request.id}",
            "created": int(time.time()),
            "model": model,
        }
        if chat_request.stream:
            pieces = await wait_for_first(_stream(replicas, label_request, ongoing))
            events = stream_events(envelope, pieces, with_usage=chat_request.wants_usage_chunk)
            return StreamingResponse(events, media_type="text/event-stream")
        result = await _label(replicas, label_request, ongoing)
        return JSONResponse(_completion(envelope, result))

    return app


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, read no further than the limit whatever Content-Length says."""
    too_large = ApiError(f"body of more than {limit:,} bytes", status=413, code="body_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _label_request(chat_request: ChatRequest, settings: ApiSettings) -> LabelRequest:
    system, user = chat_request.conversation()
    if len(user.urls) > settings.max_images:
        raise ApiError(
            f"{len(user.urls)} images: at most {settings.max_images} a request", param="messages"
        )
    return LabelRequest(
        id=uuid.uuid4().hex,
        prompt=user.text,
        images=tuple(image_bytes(url, settings.media) for url in user.urls),
        system=system,
        spec=chat_request.spec(settings.default_spec),
        generation=chat_request.generation(
            default_tokens=settings.default_tokens, most_tokens=settings.most_tokens
        ),
        media=settings.media,
    )


async def _label(replicas: Replicas, request: LabelRequest, ongoing: OngoingRequests) -> Result:
    with _unavailable_as_503(request), ongoing.counted():
        (result,) = await replicas.label([request], priority=Priority.ONLINE)
    return _checked(result, request)


async def _stream(
    replicas: StreamingReplicas, request: LabelRequest, ongoing: OngoingRequests
) -> AsyncGenerator[str | Result]:
    with _unavailable_as_503(request), ongoing.counted():
        async with aclosing(replicas.stream(request)) as pieces:
            async for piece in pieces:
                yield piece if isinstance(piece, str) else _checked(piece, request)


@contextmanager
def _unavailable_as_503(request: LabelRequest) -> Iterator[None]:
    try:
        yield
    except _UNAVAILABLE as error:
        logger.warning("request_shed", request=request.id, error=type(error).__name__)
        raise ApiError("overloaded, ask again", status=503, code="overloaded") from error


def _checked(result: Result, request: LabelRequest) -> Result:
    """The result, if it is an answer. Raises ApiError for an error result."""
    if result.error_code is None:
        return result
    message = result.error_message or result.error_code
    if result.error_code in _SERVER_FAULTS:
        logger.error("request_failed", request=request.id, error=message)
        raise ApiError("the model failed on this request", status=500, code=result.error_code)
    status = 413 if result.error_code == ImageTooLarge.code else 400
    raise ApiError(message, status=status, code=result.error_code, param="messages")


def _completion(envelope: dict[str, Any], result: Result) -> dict[str, Any]:
    message = {"role": "assistant", "content": result.text, "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": result.finish_reason,
        "logprobs": None,
    }
    return envelope | {"object": "chat.completion", "choices": [choice], "usage": usage(result)}
