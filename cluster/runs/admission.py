"""Admission of batch calls to the replicas: enough in flight to keep them full, and little more.

A replica runs as many rows at once as it has slots and as their keys and values find memory. Rows
differ in length by a factor of a hundred, with image, family and budget. Rows in flight are
therefore bounded in tokens, as far as memory is what bounds them.
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
    """FIFO admission of calls. An exclusive call has priority: nothing starts until it finishes,
    and it starts when nothing runs. One event loop owns an instance.

    A call that is larger than every bound is admitted when nothing else is in flight.
    """

    def __init__(self, *, rows: int, tokens: int | None = None, waiting: int = 0) -> None:
        """rows: bound of running rows. tokens: bound of their prompt tokens and longest answers
        together; None for no bound. waiting: rows in flight beside those that run."""
        self._max_rows = rows
        self._max_tokens = tokens
        self._waiting = waiting
        self._rows_observed = self._tokens_observed = 0.0
        self._rows_in_flight = 0
        self._queue: deque[object] = deque()
        self._exclusive_waiting = 0
        self._exclusive_running = False
        self._changed = asyncio.Condition()

    @property
    def rows(self) -> int:
        """Bound of rows in flight, given the row lengths observed so far."""
        if self._max_tokens is None or not self._tokens_observed:
            return self._max_rows + self._waiting
        running = int(self._max_tokens * self._rows_observed / self._tokens_observed)
        return min(self._max_rows, max(1, running)) + self._waiting

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
    async def admit(self, rows: int, *, exclusive: bool = False) -> AsyncIterator[None]:
        """Waits until a call of `rows` rows may start; the block is the time it is in flight."""
        async with self._changed:
            await (self._wait_until_idle() if exclusive else self._wait_for_turn(rows))
            self._exclusive_running = exclusive
            self._rows_in_flight += rows
            self._changed.notify_all()  # the next in the queue may fit beside this call
        try:
            yield
        finally:
            async with self._changed:
                self._rows_in_flight -= rows
                self._exclusive_running = False
                self._changed.notify_all()

    async def _wait_for_turn(self, rows: int) -> None:
        ticket = object()
        self._queue.append(ticket)
        try:
            await self._changed.wait_for(lambda: self._queue[0] is ticket and self._fits(rows))
        finally:
            self._queue.remove(ticket)
            self._changed.notify_all()

    def _fits(self, rows: int) -> bool:
        if self._exclusive_running or self._exclusive_waiting:
            return False
        return self._rows_in_flight == 0 or self._rows_in_flight + rows <= self.rows

    async def _wait_until_idle(self) -> None:
        self._exclusive_waiting += 1
        try:
            await self._changed.wait_for(lambda: self._rows_in_flight == 0)
        finally:
            self._exclusive_waiting -= 1
            self._changed.notify_all()
