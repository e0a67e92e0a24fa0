"""Who has a replica: calls side by side, or one call alone.

A call that is suspected of killing replicas runs alone on one, so that a death is its own doing,
while all other replicas work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.errors import Busy


class Occupancy:
    """One event loop owns an instance."""

    def __init__(self) -> None:
        self._shared = 0
        self._idle = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()

    @property
    def taken(self) -> bool:
        """Whether a call runs alone, or waits to."""
        return not self._open.is_set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """The block runs beside others, once no call is alone."""
        while self.taken:
            await self._open.wait()
        self._shared += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._shared -= 1
            if not self._shared:
                self._idle.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """The block runs once all others have ended, and keeps new ones out from now on. Raises
        Busy if another block has that right."""
        if self.taken:
            raise Busy("another call runs alone")
        self._open.clear()
        try:
            while self._shared:
                await self._idle.wait()
            yield
        finally:
            self._open.set()
