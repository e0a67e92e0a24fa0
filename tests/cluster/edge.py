"""The HTTP API without Ray: replicas that record their requests, and a client for each route."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx

from cluster.protocol import LabelRequest, Priority, StreamingReplicas
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.http.app import ApiSettings, create_app
from cluster.serving.online_calibration import OnlineBreakEven
from cluster.serving.replica import VLMReplica
from sppruner.engine.interface import Result
from tests.cluster.fake_engine import picture

ENGINE = "tests.cluster.fake_engine:FakeEngine"


class RecordingReplica:
    """A replica in this process that records its requests. It raises `failure` on every request, or
    `stream_failure` after the first piece of a stream."""

    def __init__(
        self, failure: Exception | None = None, *, stream_failure: Exception | None = None
    ) -> None:
        self.requests: list[LabelRequest] = []
        self._failure = failure
        self._stream_failure = stream_failure

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        assert priority is Priority.ONLINE
        self.requests.extend(requests)
        if self._failure is not None:
            raise self._failure
        replica = VLMReplica(EngineSettings(model="fake", engine=ENGINE))
        try:
            return await replica.label(requests, priority=priority)
        finally:
            replica.close()

    async def stats(self) -> object:
        if self._failure is not None:
            raise self._failure
        return None

    async def stream(self, request: LabelRequest) -> AsyncGenerator[str | Result]:
        (result,) = await self.label([request], priority=Priority.ONLINE)
        for word in str(result.text).split(" ") if result.error_code is None else ():
            yield f"{word} "
            if self._stream_failure is not None:
                raise self._stream_failure
        yield result


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user_message(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


USER_MESSAGE = user_message(text_part("describe"), image_part(data_uri(picture(1))))


def send_request(
    method: str,
    path: str,
    replicas: StreamingReplicas | None = None,
    settings: ApiSettings | None = None,
    break_even: OnlineBreakEven | None = None,
    **options: Any,
) -> httpx.Response:
    """Sends one request to the app of the model "fake". options: of `httpx.AsyncClient.request`."""

    async def body() -> httpx.Response:
        app = create_app(
            replicas or RecordingReplica(),
            settings or ApiSettings(),
            model="fake",
            break_even=break_even,
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asyncio.wait_for(body(), 20))


def complete(
    replicas: StreamingReplicas | None = None,
    settings: ApiSettings | None = None,
    break_even: OnlineBreakEven | None = None,
    **fields: Any,
) -> httpx.Response:
    """Sends a chat completion request; `fields` override or add fields of its body."""
    body = {"model": "fake", "messages": [USER_MESSAGE], **fields}
    return send_request("POST", "/v1/chat/completions", replicas, settings, break_even, json=body)


def read_error(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    """Status and error object of a response, which must have OpenAI's error shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error
