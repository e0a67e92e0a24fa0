"""Bounds the pixels that online requests have decoded on one replica at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class PixelRoom:
    """Requests are let in as they come, while there is room; one that is larger than all of it,
    when nobody else is in. One event loop owns an instance."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.pixels = 0
        """Of the requests that are in."""
        self._turn = asyncio.Lock()  # its waiters are served in order
        self._left = asyncio.Event()

    @asynccontextmanager
    async def held(self, pixels: int) -> AsyncIterator[None]:
        """The block runs once there is room for so many."""
        if pixels:
            async with self._turn:
                while self.pixels and self.pixels + pixels > self._most:
                    self._left.clear()
                    await self._left.wait()
                self.pixels += pixels
        try:
            yield
        finally:
            self.pixels -= pixels
            self._left.set()
