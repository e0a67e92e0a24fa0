"""The HTTP edge: OpenAI's chat completions in front of the replicas, before batch work in line.

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
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from cluster.config import MediaLimits
from cluster.controller import list_runs
from cluster.errors import Busy, ImageTooLarge, InferenceFailed, PruningNoEffect, UsageError
from cluster.protocol import LabelRequest, Priority, Replicas, RowAnswer, ServeReplicas
from cluster.runs.dispatch import REPLICA_GONE
from cluster.serving.http.openai_schema import ApiError, ChatRequest, image_bytes, usage
from cluster.serving.http.sse import begun, stream_events
from cluster.serving.online_calibration import OnlineBreakEven, measure
from sppruner.spec import DENSE, PruneSpec

logger = structlog.get_logger(__name__)

_UNAVAILABLE = (Busy, BackPressureError, DeploymentUnavailableError, *REPLICA_GONE)
_SERVER_FAULTS = (InferenceFailed.code, PruningNoEffect.code)
_RETRY_AFTER_SECONDS = "1"
# Requests at once that break-even is measured with at most: an endpoint must start in time.
_FULL_LOAD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """What the edge allows. default_spec: the pruning of requests that do not ask for any; with
    `auto` only where it was measured to pay. replicas: that share the requests."""

    default_spec: PruneSpec = DENSE
    auto: bool = False
    replicas: int = 1
    media: MediaLimits = field(default_factory=MediaLimits)
    max_body_bytes: int = 64 * 2**20
    max_images: int = 8
    default_tokens: int = 256
    most_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.auto and self.default_spec.is_dense:
            raise UsageError("auto chooses between a method and none: name a method")


class Load:
    """Requests that are being answered now."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


class Api:
    """The Serve ingress. It is up once a replica is: it asks one for the model's name, and with
    `auto` where pruning pays."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(  # type: ignore[misc]
        self, handle: DeploymentHandle[Any], settings: ApiSettings
    ) -> None:
        stats = await handle.stats.remote()
        replicas, break_even = ServeReplicas(handle), None
        if settings.auto:
            most = min(stats.slots, _FULL_LOAD)
            break_even = await measure(replicas, settings.default_spec, most=most)
        self._app = create_app(replicas, settings, model=stats.model, break_even=break_even)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def create_app(
    replicas: Replicas,
    settings: ApiSettings,
    *,
    model: str,
    break_even: OnlineBreakEven | None = None,
) -> FastAPI:
    """The endpoint for one model. Needs no Ray but for /v1/runs."""
    app = FastAPI(title="sppruner", docs_url=None, redoc_url=None)
    started = int(time.time())
    load = Load()

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        headers = {"Retry-After": _RETRY_AFTER_SECONDS} if error.status == 503 else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return await refused(request, ApiError(message, status=error.status_code))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        logger.error("request_failed", path=request.url.path, exc_info=error)
        return await refused(request, ApiError("internal error", status=500, code="internal"))

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
        asked = ChatRequest.parse(await _body(request, settings.max_body_bytes))
        if asked.model != model:
            raise ApiError(
                f"model {asked.model!r} is not served here: use {model!r}",
                status=404,
                code="model_not_found",
                param="model",
            )
        call = _call(asked, settings)
        if break_even is not None and asked.prune is None:
            per_replica = max(1.0, (load.count + 1) / settings.replicas)
            call = replace(call, spec=break_even.spec(call.spec, call.images, per_replica))
        envelope = {"id": f"chatcmpl-{call.id}", "created": int(time.time()), "model": model}
        if asked.stream:
            # What fails before the first word still has a status of its own.
            pieces = await begun(_said(replicas, call, load))
            events = stream_events(envelope, pieces, with_usage=asked.wants_usage_chunk)
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(_completion(envelope, await _answer(replicas, call, load)))

    return app


async def _body(request: Request, limit: int) -> bytes:
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


def _call(asked: ChatRequest, settings: ApiSettings) -> LabelRequest:
    system, user = asked.conversation()
    if len(user.urls) > settings.max_images:
        raise ApiError(
            f"{len(user.urls)} images: at most {settings.max_images} a request", param="messages"
        )
    return LabelRequest(
        id=uuid.uuid4().hex,
        prompt=user.text,
        images=tuple(image_bytes(url, settings.media) for url in user.urls),
        system=system,
        spec=asked.spec(settings.default_spec),
        generation=asked.generation(
            default_tokens=settings.default_tokens, most_tokens=settings.most_tokens
        ),
        media=settings.media,
    )


async def _answer(replicas: Replicas, call: LabelRequest, load: Load) -> RowAnswer:
    with _shedding(call), load.one():
        (answer,) = await replicas.label([call], priority=Priority.ONLINE)
    return _good(answer, call)


async def _said(
    replicas: Replicas, call: LabelRequest, load: Load
) -> AsyncGenerator[str | RowAnswer]:
    with _shedding(call), load.one():
        async with aclosing(replicas.stream(call)) as pieces:
            async for piece in pieces:
                yield piece if isinstance(piece, str) else _good(piece, call)


@contextmanager
def _shedding(call: LabelRequest) -> Iterator[None]:
    try:
        yield
    except _UNAVAILABLE as error:
        logger.warning("request_shed", request=call.id, error=type(error).__name__)
        raise ApiError("overloaded, ask again", status=503, code="overloaded") from error


def _good(answer: RowAnswer, call: LabelRequest) -> RowAnswer:
    """Raises ApiError for an error."""
    if answer.error_code is None:
        return answer
    message = answer.error_message or answer.error_code
    if answer.error_code in _SERVER_FAULTS:
        logger.error("request_failed", request=call.id, error=message)
        raise ApiError("the model failed on this request", status=500, code=answer.error_code)
    status = 413 if answer.error_code == ImageTooLarge.code else 400
    raise ApiError(message, status=status, code=answer.error_code, param="messages")


def _completion(envelope: dict[str, Any], answer: RowAnswer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": answer.finish_reason,
        "logprobs": None,
    }
    return envelope | {
        "object": "chat.completion",
        "choices": [choice],
        "usage": usage(answer),
    }
