"""The replica's queue: online before batch, and batches of rows that may run together.

Rows run together only if they share priority, control flag and generation settings. Control rows
are timed against each other, and measured batch seconds must not hold somebody's online request,
so neither is ever mixed; pruning specs are, because the engine gives each row its own.
Not thread-safe: one event loop owns it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeAlias

from cluster.calls import Priority, RowAnswer
from sppruner.engine.types import Generation, Request

GroupKey: TypeAlias = tuple[Priority, bool, Generation]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueuedRow:
    """A decoded row that waits for the engine; `answer` resolves when its batch is done."""

    request: Request
    priority: Priority
    answer: asyncio.Future[RowAnswer]

    @property
    def group(self) -> GroupKey:
        return self.priority, self.request.control, self.request.generation


class RowQueue:
    """Rows by group. `take` gives the oldest group of the most urgent priority there is."""

    def __init__(self) -> None:
        self._groups: dict[GroupKey, deque[tuple[int, QueuedRow]]] = {}
        self._arrivals = count()
        self._filled = asyncio.Event()

    def put(self, rows: Iterable[QueuedRow]) -> None:
        for row in rows:
            self._groups.setdefault(row.group, deque()).append((next(self._arrivals), row))
        if self._groups:
            self._filled.set()

    def discard(self, rows: Iterable[QueuedRow]) -> None:
        """Takes back rows that nobody waits for any more; rows already taken are left alone."""
        gone = {id(row) for row in rows}
        for key, queued in list(self._groups.items()):
            self._keep(key, deque(item for item in queued if id(item[1]) not in gone))

    async def take(self, limit: int) -> list[QueuedRow]:
        """Waits for a row, then returns up to `limit` rows of one group, oldest first."""
        while not self._groups:
            self._filled.clear()
            await self._filled.wait()
        key = min(self._groups, key=lambda k: (k[0], self._groups[k][0][0]))
        queued = self._groups[key]
        batch = [row for _, row in islice(queued, limit)]
        self._keep(key, deque(islice(queued, limit, None)))
        return batch

    def lengths(self) -> Counter[Priority]:
        """Waiting rows by priority."""
        return Counter(
            {p: sum(len(q) for k, q in self._groups.items() if k[0] == p) for p in Priority}
        )

    def _keep(self, key: GroupKey, queued: deque[tuple[int, QueuedRow]]) -> None:
        if queued:
            self._groups[key] = queued
        else:
            self._groups.pop(key, None)
