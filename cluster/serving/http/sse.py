"""Server-sent events of a streamed answer, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeAlias

import structlog

from cluster.errors import ApiError
from cluster.serving.http.completion import pruning, usage
from sppruner.engine.interface import Result

logger = structlog.get_logger(__name__)

HEADERS: Final = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
"""Events reach the client as they are made, whatever proxies are between."""
_ALIVE_SECONDS: Final = 15.0
_ALIVE: Final = ": waiting\n\n"

Piece: TypeAlias = tuple[int, str | Result]
"""The index of a choice, and a text of it or its result."""


async def merge(answers: Sequence[AsyncGenerator[str | Result]]) -> AsyncGenerator[Piece]:
    """The pieces of several answers as they come. Raises what one of them raises; closes all."""
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def follow(index: int, pieces: AsyncGenerator[str | Result]) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    arrived.put_nowait((index, piece))
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(follow(*one)) for one in enumerate(answers)]
    try:
        for _ in tasks:
            while (piece := await arrived.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_first(pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
    """The same pieces, returned once the first has arrived. Raises what arrives in its place, so
    that an error before the first token still has a status of its own."""
    first = await anext(pieces)

    async def rest() -> AsyncGenerator[Piece]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return rest()


async def stream_events(
    envelope: dict[str, Any],
    pieces: AsyncGenerator[Piece],
    *,
    choices: int = 1,
    with_usage: bool,
    report: bool = False,
    noted: dict[str, Any] | None = None,
) -> AsyncGenerator[str]:
    """Events in order: role, content deltas, finish reason, usage if wanted, [DONE]; a comment
    where nothing came for a while. An answer that fails midway ends with an error event.

    envelope: id, created and model, which every event repeats. report: see `completion`. noted:
    gets the usage, for the log.
    """
    envelope = envelope | {"object": "chat.completion.chunk"}
    results: dict[int, Result] = {}

    def event(index: int, delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event(envelope | {"choices": [choice]})

    for index in range(choices):
        yield event(index, {"role": "assistant", "content": ""})
    try:
        async with aclosing(_kept_alive(pieces)) as arriving:
            async for arrived in arriving:
                if arrived is None:
                    yield _ALIVE
                    continue
                index, piece = arrived
                if isinstance(piece, str):
                    if noted is not None:  # of a stream that is closed early, about as many tokens
                        noted["streamed"] = noted.get("streamed", 0) + 1
                    yield event(index, {"content": piece})
                    continue
                results[index] = piece
                yield event(index, {}, piece.finish_reason)
        used = usage([results[index] for index in sorted(results)])
        if noted is not None:
            noted |= used
        if with_usage or report:
            told = pruning(results[0]) if report else {}
            yield _event(envelope | {"choices": [], "usage": used} | told)
    except ApiError as error:
        logger.warning("stream_broken", id=envelope["id"], error=str(error))
        yield _event(error.body())
    except Exception as error:
        logger.error("stream_failed", id=envelope["id"], exc_info=error)
        yield _event(ApiError("internal error", status=500, code="internal").body())
    yield "data: [DONE]\n\n"


async def _kept_alive(pieces: AsyncGenerator[Piece]) -> AsyncGenerator[Piece | None]:
    """The pieces, and None each time that none came for a while."""
    async with aclosing(pieces):
        while True:
            coming = asyncio.ensure_future(anext(pieces))
            try:
                while not (await asyncio.wait([coming], timeout=_ALIVE_SECONDS))[0]:
                    yield None
                yield coming.result()
            except StopAsyncIteration:
                return
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait([coming])


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
