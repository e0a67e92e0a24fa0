"""Closed-loop load on a chat endpoint: so many clients, each asking again once it was answered.

Needs httpx, the extra `benchmark`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import numpy as np

from sppruner.spec import PruneSpec

_DATA: Final = "data: "
_TIMEOUT_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One request. Seconds since it was sent: until its first words and until its end."""

    first_words: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What came of some requests. seconds: from the first that was sent to the last that ended.
    errors: why others failed."""

    seconds: float
    answered: tuple[Answered, ...]
    errors: tuple[str, ...]

    @property
    def requests_per_second(self) -> float:
        return len(self.answered) / self.seconds

    def latency_ms(self, percent: float) -> float:
        return percentile_ms([one.end for one in self.answered], percent)

    def first_words_ms(self, percent: float) -> float:
        return percentile_ms([one.first_words for one in self.answered], percent)


class Failed(Exception):
    """A request that got no whole answer."""


def percentile_ms(seconds: Sequence[float], percent: float) -> float:
    """Linear between the two seconds next to it."""
    return 1e3 * float(np.percentile(seconds, percent))


def chat_body(model: str, prompt: str, image: bytes, *, spec: PruneSpec, max_tokens: int) -> bytes:
    """A streamed request about one JPEG, encoded: sending it costs the client nothing more."""
    url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": prompt},
    ]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "stream": True,
    }
    if not spec.is_dense:
        body["prune"] = {"method": spec.method, "retain": spec.budget.ratio}
    return json.dumps(body).encode()


def closed_loop(base_url: str, bodies: Sequence[bytes], clients: int) -> Load:
    """Sends every body once, `clients` at a time, to a chat endpoint."""
    return asyncio.run(_closed_loop(base_url, bodies, clients))


async def _closed_loop(base_url: str, bodies: Sequence[bytes], clients: int) -> Load:
    waiting = iter(bodies)
    answered: list[Answered] = []
    errors: list[str] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, limits=limits, trust_env=False) as http:
        began = time.perf_counter()
        url = f"{base_url}/v1/chat/completions"
        asking = (_client(http, url, waiting, answered, errors) for _ in range(clients))
        await asyncio.gather(*asking)
        seconds = time.perf_counter() - began
    return Load(seconds=seconds, answered=tuple(answered), errors=tuple(errors))


async def _client(
    http: httpx.AsyncClient,
    url: str,
    waiting: Iterator[bytes],
    answered: list[Answered],
    errors: list[str],
) -> None:
    for body in waiting:
        try:
            answered.append(await _ask(http, url, body))
        except (httpx.HTTPError, Failed) as error:
            errors.append(f"{type(error).__name__}: {error}")


async def _ask(http: httpx.AsyncClient, url: str, body: bytes) -> Answered:
    """Raises Failed, or httpx's errors."""
    began = time.perf_counter()
    first_words: float | None = None
    finished = False
    headers = {"content-type": "application/json"}
    async with http.stream("POST", url, content=body, headers=headers) as response:
        if response.status_code != httpx.codes.OK:
            raise Failed(f"{response.status_code} {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith(_DATA) or line == f"{_DATA}[DONE]":
                continue
            event = json.loads(line.removeprefix(_DATA))
            if "error" in event:
                raise Failed(str(event["error"]))
            (choice,) = event["choices"]
            if first_words is None and choice["delta"].get("content"):
                first_words = time.perf_counter() - began
            finished = finished or choice["finish_reason"] is not None
    if not finished:
        raise Failed("the stream ended before the answer did")
    end = time.perf_counter() - began
    return Answered(first_words=end if first_words is None else first_words, end=end)
