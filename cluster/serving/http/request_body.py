"""Reads request bodies, bounded in bytes, in time and in how much memory their JSON can take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final

from fastapi import Request

from cluster.errors import ApiError

MOST_VALUES: Final = 250_000
"""Commas and brackets of a JSON body at most: each may stand for an object of a hundred bytes."""
_PIECE_SECONDS: Final = 10.0
_BODY_SECONDS: Final = 120.0


class BodyRoom:
    """Bounds the bytes of all bodies that are held at the same time. One event loop owns it."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.bytes = 0
        """Held now."""

    @contextmanager
    def held(self) -> Iterator[Body]:
        """A body, which counts for the length of the block."""
        body = Body(self)
        try:
            yield body
        finally:
            self.bytes -= len(body.content)

    def take(self, size: int, *, held: int) -> None:
        """Counts more bytes of a body that holds some already. Raises ApiError where others leave
        no room for them."""
        if self.bytes > held and self.bytes + size > self._most_bytes:
            raise ApiError("overloaded, ask again", status=503, code="overloaded")
        self.bytes += size


class Body:
    """One request's body."""

    def __init__(self, room: BodyRoom) -> None:
        self._room = room
        self.content = bytearray()
        """What was read of it."""

    async def read(
        self,
        request: Request,
        limit: int,
        *,
        piece_seconds: float = _PIECE_SECONDS,
        body_seconds: float = _BODY_SECONDS,
    ) -> bytes:
        """The body, read no further than the limit whatever Content-Length says. Raises ApiError
        for one that is longer, comes too slowly, or holds more values than any request needs."""
        too_large = ApiError(
            f"body of more than {limit:,} bytes", status=413, code="body_too_large"
        )
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > limit:
            raise too_large
        try:
            async with asyncio.timeout(body_seconds):
                async for piece in _in_time(request.stream(), piece_seconds):
                    if len(self.content) + len(piece) > limit:
                        raise too_large
                    self._room.take(len(piece), held=len(self.content))
                    self.content += piece
        except TimeoutError:
            raise ApiError(
                "the body came too slowly: send it at once", status=408, code="body_too_slow"
            ) from None
        values = sum(map(self.content.count, (b",", b"[", b"{")))
        if values > MOST_VALUES:
            raise ApiError(
                f"body: more than {MOST_VALUES:,} commas and brackets, of which images need none",
                status=413,
                code="body_too_large",
            )
        return bytes(self.content)


async def _in_time(pieces: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    while True:
        async with asyncio.timeout(seconds):
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                return
        yield piece
