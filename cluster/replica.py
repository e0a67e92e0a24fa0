"""One model behind Ray Serve: the same actor answers batch jobs and online requests.

The event loop owns the queue; one dedicated thread owns the engine; images are decoded in a small
pool, online images in their own, so that neither waits behind a batch. Bad rows become answers.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import structlog
import torch
from PIL import Image

from cluster.calls import Priority, RowAnswer, RowCall
from cluster.errors import Busy, ClusterError, InferenceFailed, RowError, UsageError
from cluster.media import decode_image
from cluster.priority import QueuedRow, RowQueue
from sppruner.engine.types import Engine, Request
from sppruner.spec import OptionValue

logger = structlog.get_logger(__name__)

# Batches a caller keeps with each replica: one runs, one waits decoded, one is being decoded. The
# replica holds one more before it refuses: Serve spreads calls evenly only on average.
BATCHES_SENT = 3
_BATCHES_HELD = BATCHES_SENT + 1
_BATCH_DECODERS = 2
# So many batches in a row without one good row: the engine is broken, not the rows.
_BROKEN_AFTER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a replica builds its engine, and how much it takes at once.

    engine: "module:callable"; called with model, device, dtype, revision (if set) and `options`.
    device: "auto" is the accelerator where the replica has one, else the CPU.
    """

    model: str
    revision: str | None = None
    max_batch_rows: int = 16
    engine: str = "sppruner.engine:BatchEngine"
    device: str = "auto"
    dtype: str = "auto"
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_batch_rows < 1:
            raise UsageError(f"max_batch_rows {self.max_batch_rows}: give at least 1")
        if self.engine.count(":") != 1:
            raise UsageError(f"engine {self.engine!r}: write it as module:callable")

    @property
    def batch_rows_held(self) -> int:
        """Batch rows one replica accepts before it answers Busy."""
        return _BATCHES_HELD * self.max_batch_rows

    def build(self) -> Engine:
        """Imports and calls the factory. Raises what the factory raises."""
        module, name = self.engine.split(":")
        factory = getattr(importlib.import_module(module), name)
        pinned = {} if self.revision is None else {"revision": self.revision}
        settings = dict(model=self.model, device=self.device, dtype=self.dtype, **pinned)
        return cast(Engine, factory(**settings, **self.options))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """What one replica has done since it started. `rows` counts compute, retries included: how
    many rows were committed is the ledger's to say."""

    pid: int
    model: str
    model_revision: str
    image_backend: str
    max_batch_rows: int
    uptime_seconds: float
    busy_seconds: float
    batches: int
    rows: int
    queued_online: int
    queued_batch: int
    batch_rows_in_flight: int


class EngineBroken(ClusterError):
    """The engine raised on every row of several batches: the replica asks to be replaced."""

    code = "engine_broken"


class VLMReplica:
    """The Serve deployment. Runs equally without Serve, inside any event loop."""

    def __init__(self, settings: EngineSettings, threads: int | None = None) -> None:
        """threads: torch threads on a CPU replica; None leaves the default. Raises what the
        engine's factory raises."""
        # The engine is built where it will run: CUDA contexts and torch threads belong to a thread.
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._engine = self._engine_thread.submit(_build_engine, settings, threads).result()
        self._decoders = {
            Priority.ONLINE: ThreadPoolExecutor(1, thread_name_prefix="decode-online"),
            Priority.BATCH: ThreadPoolExecutor(_BATCH_DECODERS, thread_name_prefix="decode"),
        }
        self._settings = settings
        self._queue = RowQueue()
        self._loop_task: asyncio.Task[None] | None = None
        self._batch_rows_in_flight = 0
        self._started = time.monotonic()
        self._busy_seconds = 0.0
        self._batches = 0
        self._rows = 0
        self._barren_batches = 0
        logger.info("replica_ready", model=settings.model, revision=self._engine.model_revision)

    async def label(self, calls: Sequence[RowCall], *, priority: Priority) -> list[RowAnswer]:
        """One answer per call, in order. Raises Busy if batch rows exceed what the replica holds;
        online calls are bounded by Serve's max_ongoing_requests alone."""
        if self._loop_task is None:
            self._loop_task = asyncio.get_running_loop().create_task(self._run_batches())
        if priority is Priority.ONLINE:
            return await self._label(calls, priority)
        held = self._batch_rows_in_flight
        # A call larger than the limit still runs on an idle replica: refusing it for ever is worse.
        if held and held + len(calls) > self._settings.batch_rows_held:
            raise Busy(f"{held} batch rows in flight of {self._settings.batch_rows_held}")
        self._batch_rows_in_flight += len(calls)
        try:
            return await self._label(calls, priority)
        finally:
            self._batch_rows_in_flight -= len(calls)

    async def stats(self) -> ReplicaStats:
        waiting = self._queue.lengths()
        return ReplicaStats(
            pid=os.getpid(),
            model=self._engine.model_id,
            model_revision=self._engine.model_revision,
            image_backend=self._engine.image_backend,
            max_batch_rows=self._settings.max_batch_rows,
            uptime_seconds=time.monotonic() - self._started,
            busy_seconds=self._busy_seconds,
            batches=self._batches,
            rows=self._rows,
            queued_online=waiting[Priority.ONLINE],
            queued_batch=waiting[Priority.BATCH],
            batch_rows_in_flight=self._batch_rows_in_flight,
        )

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._barren_batches >= _BROKEN_AFTER:
            raise EngineBroken(f"no row of the last {self._barren_batches} batches could be run")
        if self._loop_task is not None and self._loop_task.done():
            raise EngineBroken("the batch loop ended") from self._loop_task.exception()

    async def _label(self, calls: Sequence[RowCall], priority: Priority) -> list[RowAnswer]:
        loop = asyncio.get_running_loop()
        pool = self._decoders[priority]
        decoded = await asyncio.gather(*(loop.run_in_executor(pool, _decode, c) for c in calls))
        answers: list[asyncio.Future[RowAnswer]] = []
        rows: list[QueuedRow] = []
        for item in decoded:
            answer: asyncio.Future[RowAnswer] = loop.create_future()
            answers.append(answer)
            if isinstance(item, RowAnswer):
                answer.set_result(item)
            else:
                rows.append(QueuedRow(request=item, priority=priority, answer=answer))
        self._queue.put(rows)
        try:
            return await asyncio.gather(*answers)
        except asyncio.CancelledError:
            self._queue.discard(rows)
            raise

    async def _run_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._queue.take(self._settings.max_batch_rows)
            requests = [row.request for row in batch]
            begun = time.monotonic()
            try:
                answers, raised = await loop.run_in_executor(
                    self._engine_thread, run_isolated, self._engine, requests
                )
            except torch.AcceleratorError as error:
                logger.critical("device_fault", rows=len(batch), error=str(error))
                _end_process()
                raise
            self._busy_seconds += time.monotonic() - begun
            self._batches += 1
            self._rows += len(batch)
            self._barren_batches = self._barren_batches + 1 if raised == len(batch) else 0
            for row, answer in zip(batch, answers, strict=True):
                if not row.answer.done():
                    row.answer.set_result(answer)


def run_isolated(engine: Engine, requests: Sequence[Request]) -> tuple[list[RowAnswer], int]:
    """Runs the batch; if the engine raises, its halves, down to the row that makes it raise.

    Returns an answer per request, and how many rows the engine raised on. Raises
    torch.AcceleratorError: a faulted device answers nothing more, so no row is to blame yet.
    """
    try:
        results = engine.run(list(requests))
        if [result.id for result in results] != [request.id for request in requests]:
            raise InferenceFailed(f"{len(results)} results for {len(requests)} requests")
        return [RowAnswer.from_result(result) for result in results], 0
    except torch.AcceleratorError:
        raise
    except Exception as error:
        failed = InferenceFailed(f"{type(error).__name__}: {error}")
    if len(requests) == 1:
        logger.warning("row_failed", row=requests[0].id, error=str(failed))
        return [RowAnswer.from_error(requests[0].id, failed)], 1
    logger.warning("batch_split", rows=len(requests), error=str(failed))
    half = len(requests) // 2
    left, left_raised = run_isolated(engine, requests[:half])
    right, right_raised = run_isolated(engine, requests[half:])
    return left + right, left_raised + right_raised


def _end_process() -> None:
    # At once, not by the next failed health check: callers see a dead replica and send the rows
    # to another, and Serve starts a new one with a fresh device context.
    os._exit(1)


def _decode(call: RowCall) -> Request | RowAnswer:
    try:
        images: tuple[Image.Image, ...] = tuple(
            decode_image(data, call.media) for data in call.images
        )
    except RowError as error:
        return RowAnswer.from_error(call.id, error)
    return Request(
        id=call.id,
        prompt=call.prompt,
        images=images,
        system=call.system,
        spec=call.spec,
        generation=call.generation,
        control=call.control,
    )


def _build_engine(settings: EngineSettings, threads: int | None) -> Engine:
    if threads is not None:
        torch.set_num_threads(threads)
    engine = settings.build()
    engine.warm_up()
    return engine
