"""Continuous batching: requests join and leave between steps, each under its own spec."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, Final

import torch

from sppruner.engine.base import ModelEngine, both_ways
from sppruner.engine.caches.encoder import EncoderCache
from sppruner.engine.caches.prefix import PrefixCache
from sppruner.engine.interface import Request, Result, Update, error_result
from sppruner.engine.isolation import isolated
from sppruner.engine.preparation import Asked, Asker
from sppruner.engine.running_batch import Row, RunningBatch
from sppruner.engine.scheduler import PrefillLimits, Scheduler
from sppruner.errors import SpecError
from sppruner.spec import DENSE

# The share of slots that a group fills, if so many requests are about: it shares one forward, and
# running rows wait while that takes place.
_GROUP: Final = 0.25
_KV_SHARE: Final = 0.6


class ContinuousEngine(ModelEngine):
    """`submit` requests, `step` while there are any, `poll` what became of them.

    Greedy answers are those of `generate` on each request alone (in float32: less exact numbers
    depend on the company that a row has). Control requests are read and
    answered by themselves, pruned and dense, once everything else that ran has finished.

    slots: slots. limits: of what is read in one forward. capacity: places of every slot,
    allocated at once, or None to grow as needed. kv_bytes: what keys and values may grow to, by
    default without bounds on a CPU and 60 % of what a GPU has left; requests wait for room.
    compiled: decode as one graph, which needs a capacity. threads: that prepare pixels.
    encodings_bytes: memory for what the last images were encoded to (`encodings` counts who was
    served from it), and as much again for what the decoder read of their prompts (`prefixes`); 0
    encodes and reads everything anew.
    Other settings: see `ModelEngine`. Single-threaded: one thread makes all calls.
    """

    def __init__(
        self,
        model: Any,
        *,
        limits: PrefillLimits | None = None,
        capacity: int | None = None,
        kv_bytes: int | None = None,
        compiled: bool = False,
        threads: int = 2,
        encodings_bytes: int = 256 * 2**20,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        if compiled and capacity is None:
            raise SpecError(
                "a compiled engine needs a capacity: places for a prompt and its answer"
            )
        self.encodings, self.prefixes = EncoderCache(encodings_bytes), PrefixCache(encodings_bytes)
        self._rows = RunningBatch(
            self._pruner,
            self._processor.tokenizer,
            ends=self._end_ids,
            slots=self.slots,
            encodings=self.encodings,
            prefixes=self.prefixes,
            capacity=capacity,
            kv_bytes=_kv_bytes(self._model.device) if kv_bytes is None else kv_bytes,
            compiled=compiled,
        )
        self.kv_token_capacity: int | None = self._rows.cache.room
        self._asker = Asker(
            self._processor,
            self._pruner,
            context=self._context,
            fits=partial(self._rows.cache.fits, 1),
            threads=threads,
        )
        self._schedule: Scheduler[Asked] = Scheduler(limits or _limits(self._model.device))
        self._asking: dict[int, tuple[Request, Future[Asked]]] = {}
        self._tickets = count()
        self._updates: list[Update] = []
        self.busy_seconds = 0.0

    @property
    def in_flight(self) -> int:
        """Requests without a result."""
        return len(self._asking) + len(self._schedule) + len(self._rows.rows)

    def submit(self, request: Request) -> int:
        """Takes a request; returns the ticket that its updates will carry."""
        ticket = next(self._tickets)
        self._asking[ticket] = request, self._asker.ask(request, ticket)
        return ticket

    def cancel(self, ticket: int) -> bool:
        """Forgets a request, whose slot is free at once; False where it has ended already."""
        if (asking := self._asking.pop(ticket, None)) is not None:
            asking[1].cancel()
            return True
        for asked in self._schedule:
            if asked.ticket == ticket:
                self._schedule.remove(asked)
                return True
        for row in self._rows.rows:
            if row.asked.ticket == ticket:
                self._rows.drop(row)
                return True
        return False

    def step(self) -> bool:
        """Reads a group of waiting requests, or says one more token for those that run; returns
        whether any request is left. Waits only where all that is left is being prepared."""
        self._gather()
        group = self._next_group()
        if not group and not self._rows.rows:
            if self._asking:
                wait([asking for _, asking in self._asking.values()], return_when=FIRST_COMPLETED)
            return self.in_flight > 0
        started = time.perf_counter()
        if group and group[0].alone:
            self._answer_controls(group)
        elif group:
            self._read(group)
        else:
            self._decode()
        self.busy_seconds += time.perf_counter() - started
        return self.in_flight > 0

    def poll(self) -> list[Update]:
        """What became of requests since the last call."""
        updates, self._updates = self._updates, []
        return updates

    def close(self) -> None:
        """Ends the engine's threads."""
        self._asker.close()

    def _gather(self) -> None:
        """Lines up what has been prepared."""
        for ticket, (request, future) in list(self._asking.items()):
            if not future.done():
                continue
            del self._asking[ticket]
            try:
                self._schedule.add(future.result())
            except Exception as error:  # The row boundary, as in `_read`.
                self._finish(ticket, error_result(request, error))

    def _next_group(self) -> list[Asked]:
        first = self._schedule.first()
        if first is None:
            return []
        running, free = self._rows.rows, self._rows.free
        asking = [request for request, _ in self._asking.values()]
        if first.alone:
            # Controls are timed together: none starts while some are still being prepared.
            ready = not running and not any(request.control for request in asking)
            return self._schedule.take(free, self._rows.fits) if ready else []
        # Among equals a group is worth waiting for; others who are on their way never are.
        waiting = sum(asked.priority == first.priority for asked in self._schedule)
        coming = waiting + sum(request.priority == first.priority for request in asking)
        if min(free, waiting) < min(coming, _GROUP * self._rows.cache.slots):
            return []
        return self._schedule.take(free, self._rows.fits)

    def _read(self, group: Sequence[Asked]) -> None:
        for finished in isolated(lambda part: [self._rows.read(part)], group, self._fail):
            self._tell(finished)

    def _fail(self, asked: Asked, error: Exception) -> list[Row]:
        """Ends a request in an error; no row is finished by it."""
        self._finish(asked.ticket, error_result(asked.request, error))
        return []

    def _decode(self) -> None:
        try:
            finished = self._rows.step()
        except torch.AcceleratorError:
            raise
        except Exception as error:  # Nobody can tell whose fault it is: all that ran have ended.
            for row in list(self._rows.rows):
                self._rows.drop(row)
                self._fail(row.asked, error)
            return
        self._tell(finished)

    def _answer_controls(self, group: list[Asked]) -> None:
        dense = [replace(a, request=replace(a.request, spec=DENSE)) for a in group]
        results = both_ways(group, dense, self._answer_alone, key=group[0].request.id)
        for asked, result in zip(group, results, strict=True):
            self._finish(asked.ticket, result)

    def _answer_alone(self, group: list[Asked]) -> list[Result]:
        """Answers a group while nothing else runs."""
        mark = len(self._updates)
        started = time.perf_counter()
        for part in self._schedule.parts(group):
            self._read(part)
        while self._rows.rows:
            self._decode()
        seconds = (time.perf_counter() - started) / len(group)
        told = self._updates[mark:]
        del self._updates[mark:]
        results = {update.ticket: update.result for update in told if update.result is not None}
        return [replace(results[asked.ticket], seconds=seconds) for asked in group]

    def _tell(self, finished: Sequence[Row]) -> None:
        """Updates of rows that have something to say, and of those that are finished."""
        for row in self._rows.rows:
            if row.unsaid and row.asked.request.stream:
                self._updates.append(Update(ticket=row.asked.ticket, text=row.unsaid))
                row.unsaid = ""
        for row in finished:
            request = row.asked.request
            text = row.transcript.text if row.transcript is not None and row.stopped else None
            result = self._result(request, row.report, row.tokens, row.seconds, text=text)
            self._finish(row.asked.ticket, result, row.unsaid if request.stream else "")

    def _finish(self, ticket: int, result: Result, text: str = "") -> None:
        self._updates.append(Update(ticket=ticket, text=text, result=result))


def _limits(device: torch.device) -> PrefillLimits:
    """A CPU is faster on groups whose states stay in its caches: the embedded model answered 158
    images/s in groups of 16, and 124 in groups of 56."""
    return PrefillLimits() if device.type == "cuda" else PrefillLimits(tokens=2048, patches=2048)


def _kv_bytes(device: torch.device) -> int | None:
    """The rest of a GPU is for what forwards need on the way."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(_KV_SHARE * free)
