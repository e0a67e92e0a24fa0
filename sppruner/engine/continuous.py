"""Continuous batching: requests join and leave between steps, each under its own spec."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, Final

import torch

from sppruner.engine.base import ModelEngine
from sppruner.engine.caches.encoder import EncoderCache
from sppruner.engine.caches.prefix import PrefixCache
from sppruner.engine.interface import (
    EngineLoad,
    Request,
    Result,
    Update,
    error_result,
    unheard,
)
from sppruner.engine.isolation import run_isolating_failures
from sppruner.engine.preparation import PreparedRequest, RequestPreparer
from sppruner.engine.running_batch import RunningBatch, RunningRequest
from sppruner.engine.scheduler import PrefillLimits, Scheduler, padded_tokens
from sppruner.engine.urgency import Urgency
from sppruner.errors import EngineError, SpecError

# The share of slots that a group waits to fill, if that many requests are on their way: a group
# shares one forward, and running requests wait while it takes place.
_GROUP_SHARE: Final = 0.25
_KV_SHARE: Final = 0.6
# One more slot for so many is kept for requests that are more urgent than some that run.
_RESERVED_SHARE: Final = 8


class ContinuousEngine(ModelEngine):
    """`submit` requests, `step` while any is left, `poll` for updates.

    In float32, greedy answers equal those of `generate` on each request alone; in less exact dtypes
    they depend on the batch.

    limits: of one prefill forward. capacity: tokens of every slot, allocated at once; None to grow
    as needed. kv_bytes: most bytes of keys and values, unbounded by default on a CPU and 60 % of a
    GPU's free memory; requests wait for memory. compiled: decode as one graph, which needs a
    capacity. threads: that prepare requests. cache_bytes: most bytes of each of the two caches,
    `encoder_cache` (vision features) and `prefix_cache` (keys and values); 0 bypasses both. Other
    settings: see `ModelEngine`. Single-threaded: one thread makes all calls.
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
        cache_bytes: int = 256 * 2**20,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        if compiled and capacity is None:
            raise SpecError("a compiled engine needs a capacity: tokens of a prompt and its answer")
        if threads < 1:
            raise SpecError(f"threads {threads}: give at least 1")
        self.encoder_cache, self.prefix_cache = EncoderCache(cache_bytes), PrefixCache(cache_bytes)
        self._running = RunningBatch(
            self._pruner,
            self._processor.tokenizer,
            eos_ids=self._eos_ids,
            slots=self.slots,
            reserved=-(-self.slots // _RESERVED_SHARE),
            encoder_cache=self.encoder_cache,
            prefix_cache=self.prefix_cache,
            capacity=capacity,
            kv_bytes=_default_kv_bytes(self._model.device) if kv_bytes is None else kv_bytes,
            compiled=compiled,
        )
        self.kv_token_capacity: int | None = self._running.cache.token_capacity
        self._preparer = RequestPreparer(
            self._processor,
            self._pruner,
            context=self._context,
            fits=partial(self._running.cache.fits, 1),
            threads=threads,
        )
        self._scheduler: Scheduler[PreparedRequest] = Scheduler(
            limits or _default_limits(self._model.device)
        )
        self._urgency = Urgency(pauses=not compiled)
        self._preparing: dict[int, tuple[Request, Future[PreparedRequest]]] = {}
        self._tickets = count()
        self._submitted: dict[int, float] = {}  # when, by ticket
        self._updates: list[Update] = []
        self.busy_seconds = 0.0
        self.heartbeat: Callable[[], None] = unheard

    @property
    def in_flight(self) -> int:
        """Requests without a result."""
        return len(self._preparing) + len(self._scheduler) + len(self._running.requests)

    @property
    def load(self) -> EngineLoad:
        """See `Engine`."""
        running = len(self._running.requests)
        return EngineLoad(
            running=running,
            waiting=self.in_flight - running,
            kv_usage=self._running.kv_usage,
        )

    def clear_caches(self) -> None:
        """See `Engine`; both caches."""
        self.encoder_cache.clear()
        self.prefix_cache.clear()

    def submit(self, request: Request) -> int:
        """Queues a request; returns the ticket that its updates carry."""
        if self._preparer.closed:
            raise EngineError("the engine is closed: open another")
        ticket = next(self._tickets)
        self._urgency.submitted(request.priority, self._running.priorities)
        self._submitted[ticket] = time.perf_counter()
        self._preparing[ticket] = request, self._preparer.prepare(request, ticket)
        return ticket

    def cancel(self, ticket: int) -> bool:
        """Drops a request and frees its slot at once; False if it has ended already."""
        self._submitted.pop(ticket, None)
        if (preparing := self._preparing.pop(ticket, None)) is not None:
            preparing[1].cancel()
            return True
        for prepared in self._scheduler:
            if prepared.ticket == ticket:
                self._scheduler.remove(prepared)
                return True
        for running in self._running.requests:
            if running.prepared.ticket == ticket:
                self._running.remove(running)
                return True
        return False

    def step(self) -> bool:
        """Prefills a group of waiting requests, or decodes one more token of the running ones;
        returns whether any request is left. While urgent ones run, others are paused but for their
        share of the time. Waits only while requests are left and all of them are being prepared."""
        self._collect_prepared()
        group = self._next_group()
        running = self._running.requests
        if not group and not running:
            if self._preparing:
                wait([f for _, f in self._preparing.values()], return_when=FIRST_COMPLETED)
            return self.in_flight > 0
        before, started = self._running.priorities, time.perf_counter()
        present = [*before, *self._scheduler.priorities]
        if group:
            priority, tokens = group[0].priority, padded_tokens(group)
            self._prefill(group)
            seconds = time.perf_counter() - started
            present.append(priority)
            self._urgency.prefilled(priority, present, tokens=tokens, seconds=seconds)
        else:
            rows = self._urgency.decode_rows(before)
            self._decode(rows)
            seconds = time.perf_counter() - started
            self._urgency.decoded(rows, before, present, seconds=seconds)
        self.busy_seconds += seconds
        return self.in_flight > 0

    def poll(self) -> list[Update]:
        """Updates since the last call."""
        updates, self._updates = self._updates, []
        return updates

    def close(self) -> None:
        """Ends the engine's threads. Requests that were not prepared yet end in an error."""
        self._preparer.close()

    def _collect_prepared(self) -> None:
        """Adds to the scheduler what has been prepared."""
        for ticket, (request, future) in list(self._preparing.items()):
            if not future.done():
                continue
            del self._preparing[ticket]
            try:
                self._scheduler.add(future.result())
            except CancelledError:
                closed = EngineError("the engine was closed before it read this request")
                self._finish(ticket, error_result(request, closed))
            except Exception as error:  # The row boundary, as in `_prefill`.
                self._finish(ticket, error_result(request, error))

    def _next_group(self) -> list[PreparedRequest]:
        waiting, running = self._scheduler.priorities, self._running.priorities
        if not waiting:
            return []
        priority = self._urgency.prefill_priority(waiting, running)
        if priority is None:
            return []
        free = self._running.free_slots(priority)
        if {*waiting, *running} == {priority}:
            # A group is worth waiting for, among requests of one priority; nobody waits for others.
            preparing = [request for request, _ in self._preparing.values()]
            coming = len(self._scheduler) + sum(r.priority == priority for r in preparing)
            if min(free, len(self._scheduler)) < min(coming, _GROUP_SHARE * self.slots):
                return []
        most_tokens = self._urgency.prefill_tokens(priority)
        return self._scheduler.take(
            free, self._running.fits, priority=priority, most_tokens=most_tokens
        )

    def _prefill(self, group: Sequence[PreparedRequest]) -> None:
        for finished in run_isolating_failures(
            lambda part: [self._running.prefill(part)], group, self._fail
        ):
            self._publish(finished)

    def _fail(self, prepared: PreparedRequest, error: Exception) -> list[RunningRequest]:
        """Ends a request in an error; returns no finished request."""
        self._finish(prepared.ticket, error_result(prepared.request, error))
        return []

    def _decode(self, rows: int) -> None:
        """One more token for the first running requests."""

        def fail(running: RunningRequest, error: Exception) -> list[RunningRequest]:
            self._running.remove(running)
            return self._fail(running.prepared, error)

        for finished in run_isolating_failures(
            lambda part: [self._running.step(part)], self._running.requests[:rows], fail
        ):
            self._publish(finished)
        self._running.sort()  # steps after a failure may have been of any of them

    def _publish(self, finished: Sequence[RunningRequest]) -> None:
        """Adds updates of requests with new text to stream, and of those that are finished."""
        for running in self._running.requests:
            if running.pending_text and running.prepared.request.stream:
                ticket = running.prepared.ticket
                self._updates.append(Update(ticket=ticket, text=running.pending_text))
                running.pending_text = ""
        for running in finished:
            request, detokenizer = running.prepared.request, running.detokenizer
            if running.sampling.failure is not None:
                self._fail(running.prepared, running.sampling.failure)
                continue
            text = detokenizer.text if detokenizer is not None and running.stopped else None
            result = self._result(
                request,
                running.report,
                running.tokens,
                running.seconds,
                text=text,
                images_cached=running.images_cached,
                suffix_tokens=running.suffix_tokens,
            )
            pending = running.pending_text if request.stream else ""
            waited = running.first_token_at - self._submitted[running.prepared.ticket]
            told = tuple(running.logprobs)
            result = replace(result, first_token_seconds=waited, logprobs=told)
            self._finish(running.prepared.ticket, result, pending)

    def _finish(self, ticket: int, result: Result, text: str = "") -> None:
        self._submitted.pop(ticket, None)
        self._updates.append(Update(ticket=ticket, text=text, result=result))


def _default_limits(device: torch.device) -> PrefillLimits:
    """A CPU is faster on groups whose states stay in its caches: the embedded model answered 158
    images/s in groups of 16, and 124 in groups of 56."""
    return PrefillLimits() if device.type == "cuda" else PrefillLimits(tokens=2048, patches=2048)


def _default_kv_bytes(device: torch.device) -> int | None:
    """The rest of a GPU's memory is for the intermediate states of forwards."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(_KV_SHARE * free)
