"""How much batch work is on its way to the replicas: as much as keeps them full, and little more.

A replica runs as many rows side by side as it has slots, and as their keys and values find room;
rows differ in length by a hundred times, with the image, the family and the budget. So what runs is
counted in tokens, as far as these are what bounds it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cluster.protocol import LabelRequest, RowAnswer

# Rows of a call to replicas of as many slots at least. A caller keeps two calls with each of them
# beside what fills its slots: one waits decoded, one is being decoded.
_CALL_ROWS = 16
_CALLS_WAITING = 2
# Rows after which what was learned of their length counts half: corpora come in order.
_REMEMBERED = 1024


class Admission:
    """Admission of calls, in the order in which they ask: so many rows at once, or one call alone.
    Who asks to be alone goes first: no further calls start until it is through. One event loop owns
    it.

    rows: most that run. tokens: most that these have together, prompts and answers as long as they
    may become; None for any number. How long rows are is learned from the last ones. waiting: rows
    on their way beside those that run. A call that is larger than all of that goes by itself.
    """

    def __init__(self, *, rows: int, tokens: int | None = None, waiting: int = 0) -> None:
        self._most = rows
        self._tokens = tokens
        self._waiting = waiting
        self._rows_known = self._tokens_known = 0.0
        self._rows_in_flight = 0
        self._line: deque[object] = deque()
        self._asking_alone = 0
        self._closed = False
        self._changed = asyncio.Condition()

    @property
    def rows(self) -> int:
        """Most rows on their way, as far as their length is known."""
        if self._tokens is None or not self._tokens_known:
            return self._most + self._waiting
        run = int(self._tokens * self._rows_known / self._tokens_known)
        return min(self._most, max(1, run)) + self._waiting

    def learn(self, calls: Sequence[LabelRequest], answers: Sequence[RowAnswer]) -> None:
        """Takes note of how long the rows of a call are. A control row is so long when pruned."""
        if self._rows_known > _REMEMBERED:
            self._rows_known /= 2
            self._tokens_known /= 2
        for call, answer in zip(calls, answers, strict=True):
            if answer.error_code is None:
                self._rows_known += 1
                self._tokens_known += answer.prompt_tokens + call.generation.max_new_tokens

    @asynccontextmanager
    async def place(self, rows: int, *, alone: bool = False) -> AsyncIterator[None]:
        """Waits until a call of so many rows may start; it is over when the block is left."""
        async with self._changed:
            await (self._empty() if alone else self._turn(rows))
            self._closed = alone
            self._rows_in_flight += rows
            self._changed.notify_all()  # whoever is next in line may fit beside
        try:
            yield
        finally:
            async with self._changed:
                self._rows_in_flight -= rows
                self._closed = False
                self._changed.notify_all()

    async def _turn(self, rows: int) -> None:
        me = object()
        self._line.append(me)
        try:
            await self._changed.wait_for(lambda: self._line[0] is me and self._open(rows))
        finally:
            self._line.remove(me)
            self._changed.notify_all()

    def _open(self, rows: int) -> bool:
        if self._closed or self._asking_alone:
            return False
        return self._rows_in_flight == 0 or self._rows_in_flight + rows <= self.rows

    async def _empty(self) -> None:
        self._asking_alone += 1
        try:
            await self._changed.wait_for(lambda: self._rows_in_flight == 0)
        finally:
            self._asking_alone -= 1
            self._changed.notify_all()


def call_rows(slots: int) -> int:
    """Rows of a call to replicas of so many slots; control rows come in as many as the slots."""
    return min(_CALL_ROWS, slots)


def rows_waiting(slots: int) -> int:
    """Batch rows that a caller keeps with such a replica beside those that run."""
    return _CALLS_WAITING * call_rows(slots)


def rows_held(slots: int) -> int:
    """Batch rows that such a replica takes before it answers Busy: what a caller keeps with it and
    as many as its slots, since Serve spreads calls evenly only on average."""
    return 2 * slots + rows_waiting(slots)
