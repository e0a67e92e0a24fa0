"""One model behind Ray Serve: the same actor answers batch jobs and online requests.

The engine has a thread of its own and serves online requests before batch rows. Images are decoded
in processes that can be killed, some for each priority, so that online images never wait behind a
batch. Bad rows become error results. A watchdog kills the process once the engine hangs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import structlog
import torch

from cluster.errors import Busy, EngineBroken, InferenceFailed, RowError
from cluster.images import image_size
from cluster.images.decoders import Decoders, DecodingUnavailable
from cluster.logs import configure_logs
from cluster.protocol import (
    BlockAnswers,
    LabelRequest,
    Priority,
    call_rows,
    row_error_result,
    rows_held,
)
from cluster.serving.control_blocks import ControlBlocks
from cluster.serving.deadline import Deadline
from cluster.serving.decoded_pictures import DecodedPictures
from cluster.serving.devices import device_name
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.engine_thread import EngineThread
from cluster.serving.occupancy import Occupancy
from cluster.serving.pixel_room import PixelRoom
from cluster.serving.replica_metrics import ReplicaMetrics
from cluster.serving.row_clock import RowClock, RowTimer
from cluster.serving.watchdog import Watchdog
from sppruner.engine.interface import Engine, Request, Result
from sppruner.engine.run_all import blank_request

logger = structlog.get_logger(__name__)

_BATCH_DECODERS = 2
# Once this many batches of rows have failed, one after another, the engine is asked for more.
_DOUBTED_AFTER = 3
# Pixels of online images that are decoded at the same time, three bytes each.
_ONLINE_PIXELS: Final = 256_000_000
# Of a health check for a blank row.
_BLANK_SECONDS: Final = 2.0
# Before every request of a client.
_URGENT: Final = Priority.ONLINE - 1
# Steps that may be slower than any later one: shapes are compiled, kernels loaded.
_FIRST_STEPS: Final = 8
# Until the news that a call runs alone has left the process, which the call may be about to kill.
_NEWS_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """Counters of one replica since it started."""

    pid: int
    """Process id of the replica."""
    model: str
    """Folder or Hub name."""
    model_revision: str
    """Content hash or commit."""
    image_backend: str
    """"pil" or "torchvision"."""
    dtype: str
    """Of the weights, such as "float32"."""
    slots: int
    """Requests that the engine answers at once."""
    uptime_seconds: float
    """Since the replica was built."""
    busy_seconds: float
    """Seconds in which the engine worked."""
    rows: int
    """Rows answered, retries included; committed rows are the ledger's to count."""
    waiting_online: int
    """Online requests without a result."""
    waiting_batch: int
    """Batch rows in the engine without a result."""
    batch_rows_in_flight: int
    """Batch rows of calls that have not returned."""
    kv_token_capacity: int | None
    """Tokens of prompts and answers that the KV cache holds; None for no bound."""


class VLMReplica:
    """The Serve deployment. Runs equally without Serve, inside any event loop."""

    def __init__(
        self, settings: EngineSettings, threads: int | None = None, *, watched: bool = False
    ) -> None:
        """threads: torch threads on a CPU replica; None leaves the default. watched: whether this
        process is the replica's own, so that a watchdog kills it when the engine hangs. Raises what
        the engine's factory raises."""
        if watched:
            configure_logs()
        settings = settings.sized(gpu=settings.device != "cpu" and torch.cuda.is_available())
        self._decoders = {
            Priority.ONLINE: Decoders(1, name="decode-online"),
            Priority.BATCH: Decoders(_BATCH_DECODERS, name="decode"),
        }
        self._decoders[Priority.BATCH].start()  # while the model is loaded
        try:
            self._thread = EngineThread(
                partial(_build_engine, settings, threads),
                _handle_fault,
                watchdog=Watchdog() if watched else None,
                deadline=Deadline(
                    first=settings.first_step_seconds,
                    least=settings.step_seconds,
                    learning=_FIRST_STEPS,
                ),
            )
        except BaseException:
            self._close_decoders()
            raise
        self._engine = self._thread.engine
        self._occupancy = Occupancy()
        self._clock = RowClock()
        self._device = device_name(settings.device)
        self._control = ControlBlocks(self._answer_arm, self._thread)
        self._closing = False
        self._online = PixelRoom(_ONLINE_PIXELS)
        self._pictures = DecodedPictures(rows=self._engine.slots, calls=_BATCH_DECODERS)
        self._batch_rows_in_flight = 0
        self._started = time.monotonic()
        self._rows = 0
        self._failed_in_a_row = 0
        self._blank: asyncio.Task[Result] | None = None
        self._metrics = ReplicaMetrics(self._engine.model_id)
        logger.info(
            "replica_ready",
            model=settings.model,
            revision=self._engine.model_revision,
            engine=type(self._engine).__name__,
        )

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        """One result per request, in order. Raises Busy where batch rows exceed what the replica
        holds, and while a call runs alone; online calls wait for that one, and are bounded by
        Serve's max_ongoing_requests alone. Batch calls wait while a control block is answered."""
        if priority is Priority.ONLINE:
            with self._control.spoiled_by_online():
                async with self._occupancy.shared(), self._online.held(_pixels(requests)):
                    return await self._label(requests, priority)
        if self._occupancy.taken:
            raise Busy("another call runs alone")
        held, most = self._batch_rows_in_flight, rows_held(self._engine.slots)
        # A call larger than the limit still runs on an idle replica: refusing it for ever is worse.
        if held and held + len(requests) > most:
            raise Busy(f"{held} batch rows in flight of {most}")
        with self._holding(requests):
            async with self._control.beside(), self._occupancy.shared():
                return await self._label(requests, priority)

    async def label_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool
    ) -> BlockAnswers:
        """See `BatchReplicas.label_block`. Online requests are answered meanwhile as ever: one of
        them spoils the block, whose dense answers are dropped at once. Raises Busy while a call
        runs alone, or another block is answered."""
        if self._occupancy.taken:
            raise Busy("another call runs alone")
        with self._holding(requests):
            async with self._control.alone(), self._occupancy.shared():
                return await self._control.measure(requests, dense_first=dense_first)

    async def label_alone(
        self, requests: Sequence[LabelRequest]
    ) -> AsyncGenerator[list[Result] | None]:
        """None once nothing else runs on this replica, then the batch call's results: what happens
        to the replica in between is these rows' doing. Raises Busy while another call has it."""
        async with self._occupancy.alone():
            await self._thread.settled()
            yield None
            await asyncio.sleep(_NEWS_SECONDS)
            yield await self._label(requests, Priority.BATCH)

    async def stream(self, request: LabelRequest) -> AsyncIterator[str | Result]:
        """The text of an online request piece by piece, then its result."""
        with self._control.spoiled_by_online():
            async with (
                self._occupancy.shared(),
                self._online.held(_pixels([request])),
                aclosing(self._stream(request)) as pieces,
            ):
                async for piece in pieces:
                    yield piece

    async def _stream(self, request: LabelRequest) -> AsyncGenerator[str | Result]:
        timer = self._clock.start()
        try:
            item = await self._decode(request, Priority.ONLINE)
            if isinstance(item, Result):
                self._metrics.answered(item, Priority.ONLINE, seconds=timer.elapsed)
                yield item
                return
            async with aclosing(self._thread.updates(replace(item, stream=True))) as updates:
                async for update in updates:
                    if update.text:
                        yield update.text
                    if update.result is not None:
                        yield self._record(update.result, timer, Priority.ONLINE)
        finally:
            timer.stop()

    async def stats(self) -> ReplicaStats:
        """Counters as of now."""
        return ReplicaStats(
            pid=os.getpid(),
            model=self._engine.model_id,
            model_revision=self._engine.model_revision,
            image_backend=self._engine.image_backend,
            dtype=self._engine.dtype,
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
        self._metrics.now(self._engine.load, busy_seconds=self._engine.busy_seconds)
        if not self._thread.alive:
            raise EngineBroken("the engine's thread has ended")
        if self._failed_in_a_row < _DOUBTED_AFTER * self._engine.slots:
            return
        # One client may have sent all of them. So the engine is asked what any engine can answer.
        if self._blank is None:
            asked = replace(blank_request(0), priority=_URGENT)
            self._blank = asyncio.create_task(self._thread.answer(asked))
        await asyncio.wait([self._blank], timeout=_BLANK_SECONDS)
        if not self._blank.done():  # others have its slots
            return
        answer = self._blank.result()
        if answer.error_code is not None:
            raise EngineBroken(
                f"the last {self._failed_in_a_row} rows could not be run, nor can a blank one: "
                f"{answer.error_message}"
            )
        logger.warning("rows_failed", rows=self._failed_in_a_row, engine="answers a blank row")
        self._blank, self._failed_in_a_row = None, 0

    def close(self) -> None:
        """Ends the engine's thread and the decoding processes. Serve ends the replica's process
        instead, and the decoding processes end with it."""
        self._closing = True
        self._close_decoders()
        self._thread.close()

    def _close_decoders(self) -> None:
        for decoders in self._decoders.values():
            decoders.close()

    @contextmanager
    def _holding(self, requests: Sequence[LabelRequest]) -> Iterator[None]:
        self._batch_rows_in_flight += len(requests)
        try:
            yield
        finally:
            self._batch_rows_in_flight -= len(requests)

    async def _answer_arm(
        self, requests: Sequence[LabelRequest], note: Callable[[str], None]
    ) -> list[Result]:
        """Rows of a control block, in calls of the length that the replica has otherwise. note: is
        told of each row as soon as it is answered."""
        size = call_rows(self._engine.slots)
        calls = [requests[start : start + size] for start in range(0, len(requests), size)]
        arm = (self._label(call, Priority.BATCH, note) for call in calls)
        answered = await asyncio.gather(*arm)
        return [result for results in answered for result in results]

    async def _label(
        self,
        requests: Sequence[LabelRequest],
        priority: Priority,
        note: Callable[[str], None] = lambda row: None,
    ) -> list[Result]:
        with ExitStack() as stack:
            timers = [self._clock.start() for _ in requests]
            for timer in timers:
                stack.callback(timer.stop)  # also of a row whose answer was never begun
            if priority is Priority.ONLINE:  # Bounded by Serve, and never waits for batch rows.
                decoded = await self._decode_call(requests, priority)
                timed = zip(decoded, timers, strict=True)
                answers = (self._answer(*one, Priority.ONLINE) for one in timed)
                return await asyncio.gather(*answers)
            async with self._pictures.turn():
                decoded = await self._decode_call(requests, priority)
                releases = [self._pictures.hold(item) for item in decoded]
                for release in releases:
                    stack.callback(release)
            held = zip(decoded, timers, releases, strict=True)
            return await asyncio.gather(*(self._answer_held(*one, note) for one in held))

    async def _answer_held(
        self,
        item: Request | Result,
        timer: RowTimer,
        release: Callable[[], None],
        note: Callable[[str], None],
    ) -> Result:
        try:
            result = await self._answer(item, timer, Priority.BATCH)
            note(item.id)
            return result
        finally:
            release()

    async def _decode_call(
        self, requests: Sequence[LabelRequest], priority: Priority
    ) -> list[Request | Result]:
        return await asyncio.gather(*(self._decode(one, priority) for one in requests))

    async def _decode(self, request: LabelRequest, priority: Priority) -> Request | Result:
        decoders, jpeg_scale = self._decoders[priority], self._engine.jpeg_scale
        try:
            images = await decoders.decode(request.images, request.media, jpeg_scale)
        except RowError as error:
            return row_error_result(request.id, error)
        except (DecodingUnavailable, OSError) as error:
            # It answers faster than any other replica, so it would get most of the rows.
            if not self._closing:
                _handle_fault(EngineBroken(f"no image can be decoded here: {error}"))
            return row_error_result(request.id, InferenceFailed(str(error)))
        except Exception as error:  # the row boundary: no property of the row
            failed = InferenceFailed(f"{type(error).__name__}: {error}")
            return row_error_result(request.id, failed)
        return Request(
            id=request.id,
            prompt=request.prompt,
            images=images,
            system=request.system,
            turns=request.turns,
            spec=request.spec,
            generation=request.generation,
            logprobs=request.logprobs,
            fit_context=request.fit_context,
            priority=priority,
        )

    async def _answer(self, item: Request | Result, timer: RowTimer, priority: Priority) -> Result:
        if isinstance(item, Result):
            self._metrics.answered(item, priority, seconds=timer.elapsed)
            return replace(item, seconds=timer.stop())
        result = await self._thread.answer(item)
        if result.id != item.id:  # nobody may get another's answer: this engine mixes them up
            _handle_fault(EngineBroken(f"the engine answered {result.id!r} for {item.id!r}"))
        return self._record(result, timer, priority)

    def _record(self, result: Result, timer: RowTimer, priority: Priority) -> Result:
        self._rows += 1
        self._metrics.answered(result, priority, seconds=timer.elapsed)
        result = replace(result, seconds=timer.stop(), device=self._device)
        if result.error_code is not None and result.error_stage is None:
            # An engine of somebody else's, which did not say: the row failed while it had it.
            result = replace(result, error_stage=InferenceFailed.stage)
        if result.error_code == InferenceFailed.code:
            self._failed_in_a_row += 1
            logger.warning("row_failed", row=result.id, error=result.error_message)
        else:
            self._failed_in_a_row = 0
        return result


def _pixels(requests: Sequence[LabelRequest]) -> int:
    """Of their images, as the headers have them; 0 for what will not be decoded."""
    images = (image for request in requests for image in request.images if image is not None)
    return sum(size[0] * size[1] for size in map(image_size, images) if size is not None)


def _handle_fault(error: Exception) -> None:
    logger.critical("engine_fault", exc_info=error)
    _end_process()


def _end_process() -> None:
    # Now, not at the next health check: clients see a dead replica and send its rows to another,
    # and Serve starts a new one with a fresh device context.
    os._exit(1)


def _build_engine(settings: EngineSettings, threads: int | None) -> Engine:
    if threads is not None:
        torch.set_num_threads(threads)
    engine = settings.build()
    engine.warm_up()
    return engine
