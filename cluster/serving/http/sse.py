"""Server-sent events of a streamed answer, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import structlog

from cluster.errors import ApiError
from cluster.serving.http.openai_schema import usage
from sppruner.engine.interface import Result

logger = structlog.get_logger(__name__)


async def wait_for_first(
    pieces: AsyncGenerator[str | Result],
) -> AsyncGenerator[str | Result]:
    """The same pieces, returned once the first has arrived. Raises what arrives in its place, so
    that an error before the first token still has a status of its own."""
    first = await anext(pieces)

    async def rest() -> AsyncGenerator[str | Result]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return rest()


async def stream_events(
    envelope: dict[str, Any], pieces: AsyncGenerator[str | Result], *, with_usage: bool
) -> AsyncGenerator[str]:
    """Events in order: role, content deltas, finish reason, usage if wanted, [DONE]. An answer that
    fails midway ends with an error event.

    envelope: id, created and model, which every event repeats.
    """
    envelope = envelope | {"object": "chat.completion.chunk"}

    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event(envelope | {"choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, str):
                    yield event({"content": piece})
                    continue
                yield event({}, piece.finish_reason)
                if with_usage:
                    yield _event(envelope | {"choices": [], "usage": usage(piece)})
    except ApiError as error:
        logger.warning("stream_broken", id=envelope["id"], error=str(error))
        yield _event(error.body())
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
