"""Base of engines that answer whole batches, for callers that submit, step and poll."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count, islice

from sppruner.engine.interface import (
    EngineLoad,
    Request,
    Result,
    SamplingParams,
    Update,
    error_result,
    unheard,
)
from sppruner.engine.isolation import run_isolating_failures
from sppruner.errors import EngineError


class QueuedEngine(ABC):
    """Requests wait in one queue per kind; each step answers a batch of the most urgent priority,
    from the queue whose first request is oldest.

    Only requests of the same priority and generation settings share a batch: an urgent request must
    not wait for the seconds of others, and a batch ends with its longest answer.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.kv_token_capacity: int | None = None
        self.busy_seconds = 0.0
        self.heartbeat: Callable[[], None] = unheard
        self._queues: dict[tuple[int, SamplingParams], deque[tuple[int, Request]]] = {}
        self._tickets = count()
        self._updates: list[Update] = []
        self._closed = False

    @abstractmethod
    def answer_batch(self, requests: list[Request]) -> list[Result]:
        """Answers a batch, in order. Where it raises, each half of the batch is tried again; what a
        single request raises becomes that request's error."""

    @property
    def in_flight(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(running=0, waiting=self.in_flight)

    def clear_caches(self) -> None:  # noqa: B027 - most have nothing to forget
        """Nothing is kept here; an engine that keeps something overrides this."""

    def submit(self, request: Request) -> int:
        if self._closed:
            raise EngineError("the engine is closed: open another")
        ticket = next(self._tickets)
        kind = request.priority, request.generation
        self._queues.setdefault(kind, deque()).append((ticket, request))
        return ticket

    def cancel(self, ticket: int) -> bool:
        for kind, waiting in list(self._queues.items()):
            left = deque(entry for entry in waiting if entry[0] != ticket)
            if len(left) < len(waiting):
                self._replace_queue(kind, left)
                return True
        return False

    def step(self) -> bool:
        if self._queues:
            kind = min(self._queues, key=lambda k: (k[0], self._queues[k][0][0]))
            waiting = self._queues[kind]
            batch = list(islice(waiting, self.slots))
            self._replace_queue(kind, deque(islice(waiting, self.slots, None)))
            started = time.perf_counter()
            results = run_isolating_failures(
                self._answer_checked, [request for _, request in batch], error_result
            )
            self.busy_seconds += time.perf_counter() - started
            self._updates += [
                Update(ticket=ticket, text=(request.stream and result.text) or "", result=result)
                for (ticket, request), result in zip(batch, results, strict=True)
            ]
        return bool(self._queues)

    def poll(self) -> list[Update]:
        updates, self._updates = self._updates, []
        return updates

    def close(self) -> None:
        """Takes no more requests."""
        self._closed = True

    def _answer_checked(self, requests: Sequence[Request]) -> list[Result]:
        results = self.answer_batch(list(requests))
        if [result.id for result in results] != [request.id for request in requests]:
            raise EngineError(f"{len(results)} results for {len(requests)} requests")
        return results

    def _replace_queue(
        self, kind: tuple[int, SamplingParams], waiting: deque[tuple[int, Request]]
    ) -> None:
        if waiting:
            self._queues[kind] = waiting
        else:
            self._queues.pop(kind, None)
