"""Control blocks at a replica: the same rows answered pruned and densely, under the conditions of
production, to measure what pruning saves.

A block has the replica to itself among batch rows. Each arm takes the ordinary way, through
decoding, queue and engine, and begins with empty caches, so that it finds in them what its own rows
left. Online requests are never held back: the first of them spoils the block.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from cluster.accounting.steady_part import steady_seconds
from cluster.protocol import BlockAnswers, LabelRequest
from cluster.serving.engine_thread import EngineThread
from cluster.serving.occupancy import Occupancy
from sppruner.engine.interface import Engine, Result
from sppruner.spec import DENSE

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arm:
    """A block's answers one way."""

    results: list[Result]
    began: float
    ended: dict[str, float] = field(default_factory=dict)
    """When each answer came, by row."""

    def steady(self, other: _Arm, slots: int) -> dict[str, float]:
        """See `steady_seconds`; of rows that were answered both ways. Those that failed both ways,
        for want of an image say, took no slot either way. Those that failed one way alone took what
        they took: they are in the arm, and none of its answers."""
        both = self.answered & other.answered
        tried = self.answered | other.answered
        ended = {row: at for row, at in self.ended.items() if row in tried}
        steady = steady_seconds(ended, self.began, slots=slots)
        return {row: seconds for row, seconds in steady.items() if row in both}

    @property
    def answered(self) -> set[str]:
        """Rows that did not fail."""
        return {result.id for result in self.results if result.error_code is None}


class ControlBlocks:
    """One event loop owns an instance."""

    def __init__(
        self,
        answer: Callable[
            [Sequence[LabelRequest], Callable[[str], None]], Coroutine[Any, Any, list[Result]]
        ],
        thread: EngineThread,
    ) -> None:
        """answer: the rows' results, by the replica's ordinary way; it is told of each row as soon
        as that is answered. thread: of the replica's engine."""
        self._answer = answer
        self._thread = thread
        self._batch = Occupancy()
        self._online = 0
        self._spoiled = asyncio.Event()
        self._warm = False

    def beside(self) -> AbstractAsyncContextManager[None]:
        """For batch rows that are in no block: once none is answered."""
        return self._batch.shared()

    def alone(self) -> AbstractAsyncContextManager[None]:
        """For a block: once all other batch rows have ended. Raises Busy while another block is
        answered, or waits."""
        return self._batch.alone()

    @contextmanager
    def spoiled_by_online(self) -> Iterator[None]:
        """For an online request, from its arrival to its end: the block of that time is spoiled."""
        self._online += 1
        self._spoiled.set()
        try:
            yield
        finally:
            self._online -= 1

    async def measure(self, requests: Sequence[LabelRequest], *, dense_first: bool) -> BlockAnswers:
        """Both arms of a block, for a caller that is `alone`."""
        if not self._online:
            self._spoiled.clear()
        twins = [replace(request, spec=DENSE) for request in requests]
        discarded = 0.0
        if not self._warm:  # kernels are chosen and memory is taken at the first dense rows' shapes
            warmed, discarded = await self._answer_densely(twins[: self._thread.engine.slots])
            self._warm = warmed is not None
        dense: _Arm | None = None
        spent = 0.0
        if dense_first:
            dense, spent = await self._answer_densely(twins)
        pruned = await self._answer_arm(requests)
        if not dense_first:
            dense, spent = await self._answer_densely(twins)
        if dense is None or self._spoiled.is_set():
            logger.info("control_block_spoiled", first_row=requests[0].id, rows=len(requests))
            return BlockAnswers(
                pruned=pruned.results, dense=None, discarded_seconds=discarded + spent
            )
        slots = self._thread.engine.slots
        return BlockAnswers(
            pruned=pruned.results,
            dense=dense.results,
            pruned_steady=pruned.steady(dense, slots),
            dense_steady=dense.steady(pruned, slots),
            discarded_seconds=discarded,
        )

    async def _answer_arm(self, requests: Sequence[LabelRequest]) -> _Arm:
        await self._thread.settled(_clear_caches)
        began, ended = time.perf_counter(), dict[str, float]()

        def note(row: str) -> None:
            ended[row] = time.perf_counter()

        return _Arm(results=await self._answer(requests, note), began=began, ended=ended)

    async def _answer_densely(self, requests: Sequence[LabelRequest]) -> tuple[_Arm | None, float]:
        """The answers, or None as soon as the block is spoiled; and the seconds that were spent."""
        if self._spoiled.is_set():
            return None, 0.0
        began = time.perf_counter()
        answering = asyncio.ensure_future(self._answer_arm(requests))
        spoiling = asyncio.ensure_future(self._spoiled.wait())
        try:
            await asyncio.wait({answering, spoiling}, return_when=asyncio.FIRST_COMPLETED)
            arm = answering.result() if answering.done() else None
        finally:
            spoiling.cancel()
            if answering.cancel():
                await asyncio.wait({answering})
        return arm, time.perf_counter() - began


def _clear_caches(engine: Engine) -> None:
    engine.clear_caches()
