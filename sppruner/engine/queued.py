"""An engine that answers whole batches, for callers that submit, step and poll."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from itertools import count, islice

from sppruner.engine.interface import Request, Result, SamplingParams, Update, error_result
from sppruner.engine.isolation import isolated
from sppruner.errors import EngineError


class QueuedEngine(ABC):
    """Requests wait by kind; each step answers the oldest kind of the most urgent priority.

    Requests are answered together only if they share priority, control flag and generation
    settings: batch seconds must not hold somebody's urgent request, control rows are timed against
    each other, and a batch ends with its longest answer.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.kv_token_capacity: int | None = None
        self.busy_seconds = 0.0
        self._kinds: dict[tuple[int, bool, SamplingParams], deque[tuple[int, Request]]] = {}
        self._tickets = count()
        self._updates: list[Update] = []

    @abstractmethod
    def answer_batch(self, requests: list[Request]) -> list[Result]:
        """Answers a batch, in order. If it raises, its halves are tried: what a single request
        raises is that request's failure."""

    @property
    def in_flight(self) -> int:
        return sum(map(len, self._kinds.values()))

    def submit(self, request: Request) -> int:
        ticket = next(self._tickets)
        kind = request.priority, request.control, request.generation
        self._kinds.setdefault(kind, deque()).append((ticket, request))
        return ticket

    def cancel(self, ticket: int) -> bool:
        for kind, waiting in list(self._kinds.items()):
            left = deque(entry for entry in waiting if entry[0] != ticket)
            if len(left) < len(waiting):
                self._keep(kind, left)
                return True
        return False

    def step(self) -> bool:
        if self._kinds:
            kind = min(self._kinds, key=lambda k: (k[0], self._kinds[k][0][0]))
            waiting = self._kinds[kind]
            batch = list(islice(waiting, self.slots))
            self._keep(kind, deque(islice(waiting, self.slots, None)))
            started = time.perf_counter()
            results = isolated(self._checked, [request for _, request in batch], error_result)
            self.busy_seconds += time.perf_counter() - started
            self._updates += [
                Update(ticket=ticket, text=(request.stream and result.text) or "", result=result)
                for (ticket, request), result in zip(batch, results, strict=True)
            ]
        return bool(self._kinds)

    def poll(self) -> list[Update]:
        updates, self._updates = self._updates, []
        return updates

    def close(self) -> None:  # noqa: B027 - a batch leaves nothing behind
        """Nothing to end."""

    def _checked(self, requests: Sequence[Request]) -> list[Result]:
        results = self.answer_batch(list(requests))
        if [result.id for result in results] != [request.id for request in requests]:
            raise EngineError(f"{len(results)} results for {len(requests)} requests")
        return results

    def _keep(
        self, kind: tuple[int, bool, SamplingParams], waiting: deque[tuple[int, Request]]
    ) -> None:
        if waiting:
            self._kinds[kind] = waiting
        else:
            self._kinds.pop(kind, None)
