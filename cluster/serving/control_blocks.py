"""Control blocks at a replica: the same rows answered pruned and densely, under the conditions of
production, to measure what pruning saves.

A block has the replica to itself among batch rows. Each arm takes the ordinary way, through
decoding, queue and engine, and begins with empty caches, so that it finds in them what its own rows
left. Online requests are never held back: the first of them spoils the block.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace

import structlog

from cluster.protocol import BlockAnswers, LabelRequest
from cluster.serving.engine_thread import EngineThread
from cluster.serving.occupancy import Occupancy
from sppruner.engine.interface import Engine, Result
from sppruner.spec import DENSE

logger = structlog.get_logger(__name__)


class ControlBlocks:
    """One event loop owns an instance."""

    def __init__(
        self,
        answer: Callable[[Sequence[LabelRequest]], Awaitable[list[Result]]],
        thread: EngineThread,
    ) -> None:
        """answer: the rows' results, by the replica's ordinary way. thread: of its engine."""
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
        pruned: list[Result] = []
        dense: list[Result] | None = None
        spent = 0.0
        for is_dense in (dense_first, not dense_first):
            if is_dense:
                dense, spent = await self._answer_densely(twins)
            else:
                await self._thread.settled(_clear_caches)
                pruned = await self._answer(requests)
        if self._spoiled.is_set():
            logger.info("control_block_spoiled", first_row=requests[0].id, rows=len(requests))
            return BlockAnswers(pruned=pruned, dense=None, discarded_seconds=discarded + spent)
        return BlockAnswers(pruned=pruned, dense=dense, discarded_seconds=discarded)

    async def _answer_densely(
        self, requests: Sequence[LabelRequest]
    ) -> tuple[list[Result] | None, float]:
        """The answers, or None as soon as the block is spoiled; and the seconds that were spent."""
        if self._spoiled.is_set():
            return None, 0.0
        await self._thread.settled(_clear_caches)
        began = time.perf_counter()
        answering = asyncio.ensure_future(self._answer(requests))
        spoiling = asyncio.ensure_future(self._spoiled.wait())
        try:
            await asyncio.wait({answering, spoiling}, return_when=asyncio.FIRST_COMPLETED)
            results = answering.result() if answering.done() else None
        finally:
            spoiling.cancel()
            if answering.cancel():
                await asyncio.wait({answering})
        return results, time.perf_counter() - began


def _clear_caches(engine: Engine) -> None:
    engine.clear_caches()
