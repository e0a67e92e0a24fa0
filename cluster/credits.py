"""How much batch work is on its way to the replicas: as much as keeps them full, and little more.

Rows differ in length by a hundred times, with the image, the family and the budget. A replica runs
as many side by side as its slots, and as their keys and values find room; what is sent beyond that
only waits there, as pixels in memory. So credits are counted in tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cluster.calls import RowAnswer, RowCall


class Credits:
    """Admission of calls: so much work at once, or one call alone. Who asks to be alone goes first:
    no further calls start until it is through. One event loop owns it.

    rows: most rows on their way. tokens: most tokens that these have together, prompts and answers
    as long as they may become, as the rows answered so far are on average; None for any number, and
    until the first is answered. calls: so many are let through however large they are.
    """

    def __init__(self, *, rows: int, tokens: int | None = None, calls: int = 1) -> None:
        self._rows = rows
        self._tokens = tokens
        self._calls = calls
        self._rows_known = self._tokens_known = 0
        self._rows_in_flight = self._calls_in_flight = 0
        self._asking_alone = 0
        self._closed = False
        self._changed = asyncio.Condition()

    @property
    def rows(self) -> int:
        """Most rows on their way, as far as their length is known."""
        if self._tokens is None or not self._tokens_known:
            return self._rows
        return min(self._rows, self._tokens * self._rows_known // self._tokens_known)

    def learn(self, calls: Sequence[RowCall], answers: Sequence[RowAnswer]) -> None:
        """Takes note of how long the rows of a call are. A control row is so long when pruned."""
        for call, answer in zip(calls, answers, strict=True):
            if answer.error_code is None:
                self._rows_known += 1
                self._tokens_known += answer.prompt_tokens + call.generation.max_new_tokens

    @asynccontextmanager
    async def place(self, rows: int, *, alone: bool = False) -> AsyncIterator[None]:
        """Waits until a call of so many rows may start; it is over when the block is left."""
        async with self._changed:
            await (self._empty() if alone else self._changed.wait_for(lambda: self._open(rows)))
            self._closed = alone
            self._calls_in_flight += 1
            self._rows_in_flight += rows
        try:
            yield
        finally:
            async with self._changed:
                self._calls_in_flight -= 1
                self._rows_in_flight -= rows
                self._closed = False
                self._changed.notify_all()

    def _open(self, rows: int) -> bool:
        if self._closed or self._asking_alone:
            return False
        return self._calls_in_flight < self._calls or self._rows_in_flight + rows <= self.rows

    async def _empty(self) -> None:
        self._asking_alone += 1
        try:
            await self._changed.wait_for(lambda: self._calls_in_flight == 0)
        finally:
            self._asking_alone -= 1
            self._changed.notify_all()
