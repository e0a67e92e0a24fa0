"""The HTTP edge without Ray: replicas that remember what they were asked, and ways to ask."""

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


class Recorded:
    """A replica in this process that remembers the calls it got, or fails as told: at once, or
    after the first word of a stream."""

    def __init__(
        self, failure: Exception | None = None, *, breaks: Exception | None = None
    ) -> None:
        self.calls: list[LabelRequest] = []
        self._failure = failure
        self._breaks = breaks

    async def label(self, calls: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        assert priority is Priority.ONLINE
        self.calls.extend(calls)
        if self._failure is not None:
            raise self._failure
        replica = VLMReplica(EngineSettings(model="fake", engine=ENGINE))
        try:
            return await replica.label(calls, priority=priority)
        finally:
            replica.close()

    async def stream(self, call: LabelRequest) -> AsyncGenerator[str | Result]:
        (answer,) = await self.label([call], priority=Priority.ONLINE)
        for word in str(answer.text).split(" ") if answer.error_code is None else ():
            yield f"{word} "
            if self._breaks is not None:
                raise self._breaks
        yield answer


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


ASKED = user(text_part("describe"), image_part(data_uri(picture(1))))


def send(
    method: str,
    path: str,
    replicas: StreamingReplicas | None = None,
    settings: ApiSettings | None = None,
    break_even: OnlineBreakEven | None = None,
    **more: Any,
) -> httpx.Response:
    async def body() -> httpx.Response:
        app = create_app(
            replicas or Recorded(), settings or ApiSettings(), model="fake", break_even=break_even
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            return await client.request(method, path, **more)

    return asyncio.run(asyncio.wait_for(body(), 20))


def ask(
    replicas: StreamingReplicas | None = None,
    settings: ApiSettings | None = None,
    break_even: OnlineBreakEven | None = None,
    **fields: Any,
) -> httpx.Response:
    body = {"model": "fake", "messages": [ASKED], **fields}
    return send("POST", "/v1/chat/completions", replicas, settings, break_even, json=body)


def refusal(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error
