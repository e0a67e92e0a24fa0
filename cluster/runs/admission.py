"""Admission of batch calls to the replicas: enough in flight to keep them full, and little more.

A replica runs as many rows at once as it has slots and as their keys and values find memory. Rows
differ in length by a factor of a hundred, with image, family and budget. Rows in flight are
therefore bounded in tokens, as far as memory is what bounds them, and in bytes of their images.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from cluster.protocol import LabelRequest
from sppruner.engine.interface import Result

# After this many rows the lengths observed so far count half: corpora are ordered.
_REMEMBERED: Final = 1024


class Admission:
    """FIFO admission of calls. One event loop owns an instance.

    A call that is larger than every bound is admitted when nothing else is in flight.
    """

    def __init__(
        self,
        *,
        rows: int,
        tokens: int | None = None,
        waiting: int = 0,
        size: int | None = None,
        replicas: int = 1,
    ) -> None:
        """rows: bound of running rows. tokens: bound of their prompt tokens and longest answers
        together. waiting: rows in flight beside those that run. size: bound of the bytes of their
        images. None is no bound. replicas: those for which the bounds are meant; see `resize`."""
        self._max_rows = rows
        self._max_tokens = tokens
        self._waiting = waiting
        self._max_size = size
        self._replicas = self._live = replicas
        self._rows_observed = self._tokens_observed = 0.0
        self._rows_in_flight = self._size_in_flight = 0
        self._queue: deque[object] = deque()
        self._changed = asyncio.Condition()

    @property
    def rows(self) -> int:
        """Bound of rows in flight, given the live replicas and the row lengths observed so far."""
        share = self._live / self._replicas
        slots, waiting = max(1, int(share * self._max_rows)), int(share * self._waiting)
        if self._max_tokens is None or not self._tokens_observed:
            return slots + waiting
        tokens = share * self._max_tokens
        running = int(tokens * self._rows_observed / self._tokens_observed)
        return min(slots, max(1, running)) + waiting

    @property
    def size(self) -> int | None:
        """Bound of the bytes in flight."""
        if self._max_size is None:
            return None
        return int(self._live / self._replicas * self._max_size)

    async def resize(self, replicas: int) -> None:
        """Every bound follows the number of replicas that live. Without any, calls of one replica
        are admitted: they wait at the fleet, within their deadline."""
        async with self._changed:
            self._live = max(1, replicas)
            self._changed.notify_all()

    def observe(self, requests: Sequence[LabelRequest], results: Sequence[Result]) -> None:
        """Records the lengths of answered rows; of a control row the pruned length."""
        if self._rows_observed > _REMEMBERED:
            self._rows_observed /= 2
            self._tokens_observed /= 2
        for request, result in zip(requests, results, strict=True):
            if result.error_code is None:
                self._rows_observed += 1
                self._tokens_observed += result.prompt_tokens + request.generation.max_new_tokens

    @asynccontextmanager
    async def admit(self, rows: int, size: int = 0, *, again: bool = False) -> AsyncIterator[None]:
        """Waits until a call of `rows` rows with `size` bytes of images may start; the block is the
        time it is in flight. again: a call that was sent before goes first, since others of its
        unit wait for it."""
        async with self._changed:
            await self._wait_for_turn(rows, size, again=again)
            self._rows_in_flight += rows
            self._size_in_flight += size
            self._changed.notify_all()  # the next in the queue may fit beside this call
        try:
            yield
        finally:
            async with self._changed:
                self._rows_in_flight -= rows
                self._size_in_flight -= size
                self._changed.notify_all()

    async def _wait_for_turn(self, rows: int, size: int, *, again: bool) -> None:
        ticket = object()
        (self._queue.appendleft if again else self._queue.append)(ticket)

        def has_turn() -> bool:
            return self._queue[0] is ticket and self._fits(rows, size)

        try:
            await self._changed.wait_for(has_turn)
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()

    def _fits(self, rows: int, size: int) -> bool:
        if self._rows_in_flight == 0:
            return True
        most = self.size
        fits = most is None or self._size_in_flight + size <= most
        return fits and self._rows_in_flight + rows <= self.rows
