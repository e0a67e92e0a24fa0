"""Closed-loop load on a chat endpoint: each client sends its next request after a response.

Needs httpx (the extra `benchmark`).
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

from cluster.errors import LoadFailed
from sppruner.spec import PruneSpec

_DATA: Final = "data: "
_TIMEOUT_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """One complete response."""

    first_token: float
    """Seconds from sending the request to the first text of the response."""
    end: float
    """Seconds from sending the request to the end of the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """Outcome of a set of requests."""

    seconds: float
    """From the first request sent to the last response ended."""
    answered: tuple[RequestTiming, ...]
    """Complete responses."""
    errors: tuple[str, ...]
    """One message per request without a complete response."""

    @property
    def requests_per_second(self) -> float:
        return len(self.answered) / self.seconds

    def latency_ms(self, percent: float) -> float:
        return percentile_ms([one.end for one in self.answered], percent)

    def ttft_ms(self, percent: float) -> float:
        return percentile_ms([one.first_token for one in self.answered], percent)


def percentile_ms(seconds: Sequence[float], percent: float) -> float:
    """Percentile in milliseconds, interpolated linearly between neighbours."""
    return 1e3 * float(np.percentile(seconds, percent))


def build_chat_body(
    model: str, prompt: str, image: bytes, *, spec: PruneSpec, max_tokens: int
) -> bytes:
    """A streamed request about one JPEG, encoded beforehand so that sending it is cheap."""
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


def run_closed_loop(
    base_url: str, bodies: Sequence[bytes], clients: int, *, pause: float = 0.0
) -> LoadResult:
    """Sends every body once to a chat endpoint, with `clients` requests in flight. pause: seconds
    that a client waits after each response."""
    return asyncio.run(_run_clients(base_url, bodies, clients, pause))


async def _run_clients(
    base_url: str, bodies: Sequence[bytes], clients: int, pause: float
) -> LoadResult:
    waiting = iter(bodies)
    answered: list[RequestTiming] = []
    errors: list[str] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS, limits=limits, trust_env=False) as http:
        started = time.perf_counter()
        url = f"{base_url}/v1/chat/completions"
        tasks = (_run_client(http, url, waiting, answered, errors, pause) for _ in range(clients))
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    return LoadResult(seconds=seconds, answered=tuple(answered), errors=tuple(errors))


async def _run_client(
    http: httpx.AsyncClient,
    url: str,
    waiting: Iterator[bytes],
    answered: list[RequestTiming],
    errors: list[str],
    pause: float,
) -> None:
    for body in waiting:
        try:
            answered.append(await _send(http, url, body))
        except (httpx.HTTPError, LoadFailed) as error:
            errors.append(f"{type(error).__name__}: {error}")
        await asyncio.sleep(pause)


async def _send(http: httpx.AsyncClient, url: str, body: bytes) -> RequestTiming:
    """Sends one request and reads its stream. Raises LoadFailed or httpx's errors."""
    started = time.perf_counter()
    first_token: float | None = None
    finished = False
    headers = {"content-type": "application/json"}
    async with http.stream("POST", url, content=body, headers=headers) as response:
        if response.status_code != httpx.codes.OK:
            raise LoadFailed(f"{response.status_code} {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith(_DATA) or line == f"{_DATA}[DONE]":
                continue
            event = json.loads(line.removeprefix(_DATA))
            if "error" in event:
                raise LoadFailed(str(event["error"]))
            (choice,) = event["choices"]
            if first_token is None and choice["delta"].get("content"):
                first_token = time.perf_counter() - started
            finished = finished or choice["finish_reason"] is not None
    if not finished:
        raise LoadFailed("the stream ended before the response did")
    end = time.perf_counter() - started
    return RequestTiming(first_token=end if first_token is None else first_token, end=end)
