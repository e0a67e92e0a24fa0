"""An answer as server-sent events in OpenAI's shape, word by word."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import structlog

from cluster.protocol import RowAnswer
from cluster.serving.http.openai_schema import ApiError, usage

logger = structlog.get_logger(__name__)


async def begun(
    pieces: AsyncGenerator[str | RowAnswer],
) -> AsyncGenerator[str | RowAnswer]:
    """The same pieces, once the first is there. Raises what comes instead of a first one."""
    first = await anext(pieces)

    async def rest() -> AsyncGenerator[str | RowAnswer]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return rest()


async def stream_events(
    envelope: dict[str, Any], pieces: AsyncGenerator[str | RowAnswer], *, with_usage: bool
) -> AsyncGenerator[str]:
    """Role, words, finish reason, usage if asked, [DONE]; an error where the answer breaks off."""
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
