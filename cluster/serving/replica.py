"""One model behind Ray Serve: the same actor answers batch jobs and online requests.

The engine has a thread of its own, where online rows go before batch rows. Images are decoded in a
small pool, online images in their own, so that neither waits behind a batch. Bad rows become
answers.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import structlog
import torch
from PIL import Image

from cluster.errors import Busy, ClusterError, InferenceFailed, RowError, UsageError
from cluster.images import decode_image
from cluster.protocol import LabelRequest, Priority, RowAnswer
from cluster.runs.admission import rows_held
from cluster.serving.engine_thread import EngineThread
from sppruner.engine.interface import DTYPES, Engine, JpegScale, Request, Result
from sppruner.spec import OptionValue

logger = structlog.get_logger(__name__)

_BATCH_DECODERS = 2
# Slots where nobody asked for a number. A CPU computes no faster for more; a GPU does, as far as it
# has room for their keys and values, which its engine sees to.
_CPU_ROWS, _GPU_ROWS = 16, 64
# So many batches of rows in a row without one good one: the engine is broken, not the rows.
_BROKEN_AFTER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a replica builds its engine, and how much it takes at once.

    engine: "module:callable"; called with model, device, dtype, slots, revision (if set)
    and `options`.
    device: "auto" is the accelerator where the replica has one, else the CPU.
    slots: None for what the replica's device suits, see `sized`.
    """

    model: str
    revision: str | None = None
    slots: int | None = None
    engine: str = "sppruner.engine:open_engine"
    device: str = "auto"
    dtype: str = "auto"
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"slots {self.slots}: give at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.engine.count(":") != 1:
            raise UsageError(f"engine {self.engine!r}: write it as module:callable")

    def sized(self, *, gpu: bool) -> EngineSettings:
        """These settings, with a number of rows."""
        return replace(self, slots=self.slots or slots_of(gpu=gpu))

    def build(self) -> Engine:
        """Imports and calls the factory. Raises what the factory raises. For settings that are
        `sized`."""
        assert self.slots is not None
        module, name = self.engine.split(":")
        factory = getattr(importlib.import_module(module), name)
        pinned = {} if self.revision is None else {"revision": self.revision}
        settings = dict(model=self.model, device=self.device, dtype=self.dtype, **pinned)
        return cast(Engine, factory(slots=self.slots, **settings, **self.options))


def slots_of(*, gpu: bool) -> int:
    """Of a replica on such a device, where nobody asked for a number."""
    return _GPU_ROWS if gpu else _CPU_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """What one replica has done since it started. `rows` counts compute, retries included: how
    many rows were committed is the ledger's to say. waiting: rows that the engine has no result
    for yet. slots, kv_token_capacity: the engine's."""

    pid: int
    model: str
    model_revision: str
    image_backend: str
    slots: int
    uptime_seconds: float
    busy_seconds: float
    rows: int
    waiting_online: int
    waiting_batch: int
    batch_rows_in_flight: int
    kv_token_capacity: int | None


class EngineBroken(ClusterError):
    """The engine answers nothing more, or fails on whatever it is given: its replica asks to be
    replaced."""

    code = "engine_broken"


class VLMReplica:
    """The Serve deployment. Runs equally without Serve, inside any event loop."""

    def __init__(self, settings: EngineSettings, threads: int | None = None) -> None:
        """threads: torch threads on a CPU replica; None leaves the default. Raises what the
        engine's factory raises."""
        settings = settings.sized(gpu=settings.device != "cpu" and torch.cuda.is_available())
        self._thread = EngineThread(partial(_build_engine, settings, threads), _fault)
        self._engine = self._thread.engine
        self._decoders = {
            Priority.ONLINE: ThreadPoolExecutor(1, thread_name_prefix="decode-online"),
            Priority.BATCH: ThreadPoolExecutor(_BATCH_DECODERS, thread_name_prefix="decode"),
        }
        self._settings = settings
        self._batch_rows_in_flight = 0
        self._started = time.monotonic()
        self._rows = 0
        self._failed_in_a_row = 0
        logger.info(
            "replica_ready",
            model=settings.model,
            revision=self._engine.model_revision,
            engine=type(self._engine).__name__,
        )

    async def label(self, calls: Sequence[LabelRequest], *, priority: Priority) -> list[RowAnswer]:
        """One answer per call, in order. Raises Busy if batch rows exceed what the replica holds;
        online calls are bounded by Serve's max_ongoing_requests alone."""
        if priority is Priority.ONLINE:
            return await self._label(calls, priority)
        held, most = self._batch_rows_in_flight, rows_held(self._engine.slots)
        # A call larger than the limit still runs on an idle replica: refusing it for ever is worse.
        if held and held + len(calls) > most:
            raise Busy(f"{held} batch rows in flight of {most}")
        self._batch_rows_in_flight += len(calls)
        try:
            return await self._label(calls, priority)
        finally:
            self._batch_rows_in_flight -= len(calls)

    async def stream(self, call: LabelRequest) -> AsyncIterator[str | RowAnswer]:
        """The answer to an online call as it is said, then the whole."""
        loop, pool = asyncio.get_running_loop(), self._decoders[Priority.ONLINE]
        jpeg_scale = self._engine.jpeg_scale
        item = await loop.run_in_executor(pool, _decode, call, Priority.ONLINE, jpeg_scale)
        if isinstance(item, RowAnswer):
            yield item
            return
        async with aclosing(self._thread.updates(replace(item, stream=True))) as updates:
            async for update in updates:
                if update.text:
                    yield update.text
                if update.result is not None:
                    yield self._counted(update.result)

    async def stats(self) -> ReplicaStats:
        return ReplicaStats(
            pid=os.getpid(),
            model=self._engine.model_id,
            model_revision=self._engine.model_revision,
            image_backend=self._engine.image_backend,
            slots=self._engine.slots,
            uptime_seconds=time.monotonic() - self._started,
            busy_seconds=self._engine.busy_seconds,
            rows=self._rows,
            waiting_online=self._thread.waiting(Priority.ONLINE),
            waiting_batch=self._thread.waiting(Priority.BATCH),
            batch_rows_in_flight=self._batch_rows_in_flight,
            kv_token_capacity=self._engine.kv_token_capacity,
        )

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._failed_in_a_row >= _BROKEN_AFTER * self._engine.slots:
            raise EngineBroken(f"the last {self._failed_in_a_row} rows could not be run")
        if not self._thread.alive:
            raise EngineBroken("the engine's thread has ended")

    def close(self) -> None:
        """Ends the engine's thread. Serve ends the whole process instead."""
        self._thread.close()

    async def _label(self, calls: Sequence[LabelRequest], priority: Priority) -> list[RowAnswer]:
        loop = asyncio.get_running_loop()
        pool, jpeg_scale = self._decoders[priority], self._engine.jpeg_scale
        decoding = (
            loop.run_in_executor(pool, _decode, call, priority, jpeg_scale) for call in calls
        )
        decoded = await asyncio.gather(*decoding)
        return await asyncio.gather(*(self._answer(item) for item in decoded))

    async def _answer(self, item: Request | RowAnswer) -> RowAnswer:
        if isinstance(item, RowAnswer):
            return item
        return self._counted(await self._thread.answer(item))

    def _counted(self, result: Result) -> RowAnswer:
        self._rows += 1
        if result.error_code == InferenceFailed.code:
            self._failed_in_a_row += 1
            logger.warning("row_failed", row=result.id, error=result.error_message)
        else:
            self._failed_in_a_row = 0
        return RowAnswer.from_result(result)


def _fault(error: Exception) -> None:
    logger.critical("engine_fault", exc_info=error)
    _end_process()


def _end_process() -> None:
    # At once, not by the next failed health check: callers see a dead replica and send the rows
    # to another, and Serve starts a new one with a fresh device context.
    os._exit(1)


def _decode(call: LabelRequest, priority: Priority, jpeg_scale: JpegScale) -> Request | RowAnswer:
    try:
        images: tuple[Image.Image, ...] = tuple(
            decode_image(data, call.media, jpeg_scale) for data in call.images
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
        priority=priority,
    )


def _build_engine(settings: EngineSettings, threads: int | None) -> Engine:
    if threads is not None:
        torch.set_num_threads(threads)
    engine = settings.build()
    engine.warm_up()
    return engine
