"""Bounds the decoded pictures that a replica holds for batch rows: what is decoded too early only
takes memory, up to a hundred times that of the compressed image."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from sppruner.engine.interface import Request, Result

MOST_BYTES: Final = 256 * 2**20
"""Of pixels without a result, while the engine has enough rows."""


class DecodedPictures:
    """The next call is decoded while the pixels without a result are fewer than `most_bytes`, or
    their rows fewer than `rows`: an engine with large images is kept busy too.

    calls: decoded at the same time; their pictures may come on top of the bound.
    """

    def __init__(self, *, rows: int, calls: int, most_bytes: int | None = None) -> None:
        self._most_rows = rows
        self._most_bytes = MOST_BYTES if most_bytes is None else most_bytes
        self.rows = 0
        """Decoded and without a result."""
        self.bytes = 0
        """Of their pixels."""
        self._turns = asyncio.Semaphore(calls)
        self._room = asyncio.Event()
        self._room.set()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """For decoding one call, once there is room."""
        async with self._turns:
            await self._room.wait()
            yield

    def hold(self, item: Request | Result) -> Callable[[], None]:
        """Counts a decoded row until the returned function is called for the first time."""
        size = _pixel_bytes(item)
        self._count(1, size)
        held = [True]

        def release() -> None:
            if held:
                held.clear()
                self._count(-1, -size)

        return release

    def _count(self, rows: int, size: int) -> None:
        self.rows += rows
        self.bytes += size
        if self.bytes < self._most_bytes or self.rows < self._most_rows:
            self._room.set()
        else:
            self._room.clear()


def _pixel_bytes(item: Request | Result) -> int:
    """Three bytes a pixel; nothing for a row that has failed already."""
    images = () if isinstance(item, Result) else item.images
    return sum(3 * image.width * image.height for image in images)
