"""Replicas that die, hang, stop, refuse, answer late and wrongly, by a seeded schedule."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final, Literal, TypeAlias

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from cluster.errors import Busy
from cluster.protocol import BlockAnswers, LabelRequest, Priority
from cluster.serving.occupancy import Occupancy
from sppruner.engine.interface import Result
from tests.cluster.measured_blocks import even_block

Accident: TypeAlias = Literal["die", "stop", "lose", "late", "wrong", "raise", "fail"]
ACCIDENTS: Final[tuple[Accident, ...]] = ("die", "stop", "lose", "late", "wrong", "raise", "fail")
"""What befalls a call by no fault of its rows: its replica dies or is stopped, its answer is lost,
comes hours later, is that of other rows, is an exception, or every row of it fails."""

RESTART_SECONDS: Final = 30.0
WATCHDOG_SECONDS: Final = 120.0
_IDS = count()


@dataclass(eq=False)
class Replica:
    """One process; `ended` is set to what its calls end in."""

    id: str = field(default_factory=lambda: f"replica-{next(_IDS)}")
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: bool = False
    occupancy: Occupancy = field(default_factory=Occupancy)


@dataclass(kw_only=True)
class Schedule:
    """What happens in one simulation."""

    seed: int = 0
    replicas: int = 1
    killers: frozenset[str] = frozenset()
    """Rows that kill their replica, soon."""
    hangers: frozenset[str] = frozenset()
    """Rows that hang their replica, until the watchdog kills it."""
    failing: frozenset[str] = frozenset()
    """Rows on which the model fails."""
    accidents: Sequence[Accident] = ()
    """Each befalls one call, at random."""
    refusals: int = 0
    """Calls refused as busy, at random."""


class SimulatedFleet:
    """`BatchReplicas`. Serve's part is played too: a call goes to some replica that answers probes,
    and waits while there is none."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._random = random.Random(schedule.seed)
        self._accidents = list(schedule.accidents)
        self._refusals = schedule.refusals
        self._struck: Counter[str] = Counter()
        self._replicas = [Replica() for _ in range(schedule.replicas)]
        self.calls = 0
        self.calls_beside_alone = 0
        self.deaths_by_rows = 0
        self.answered: Counter[str] = Counter()
        """Times that each row was answered in time and properly."""

    async def label(self, requests: Sequence[LabelRequest], *, priority: Priority) -> list[Result]:
        assert priority is Priority.BATCH
        replica = await self._route()
        if replica.occupancy.taken:
            raise Busy("another call runs alone")
        if any(other.occupancy.taken for other in self._replicas):
            self.calls_beside_alone += 1
        async with replica.occupancy.shared():
            return await self._run(replica, requests)

    async def label_alone(
        self, requests: Sequence[LabelRequest]
    ) -> AsyncGenerator[list[Result] | None]:
        replica = await self._route()
        entering = replica.occupancy.alone()
        entered = asyncio.ensure_future(entering.__aenter__())
        try:
            await self._unless_ended(replica, entered)
            yield None
            yield await self._run(replica, requests)
        finally:
            if entered.done() and not entered.cancelled() and entered.exception() is None:
                await entering.__aexit__(None, None, None)

    async def label_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool
    ) -> BlockAnswers:
        replica = await self._route()
        if replica.occupancy.taken:
            raise Busy("another call runs alone")
        async with replica.occupancy.shared():
            arms = [await self._run(replica, requests) for _ in range(2)]
        pruned, dense = arms[::-1] if dense_first else arms
        spoiled = self._random.random() < 0.2
        return even_block(pruned, None if spoiled else dense)

    async def _route(self) -> Replica:
        self.calls += 1
        await asyncio.sleep(0)
        if self._refusals and self._random.random() < 0.3:
            self._refusals -= 1
            raise self._random.choice([Busy("full"), BackPressureError(9, 8)])
        while not (up := [r for r in self._replicas if not r.stopped]):
            await asyncio.sleep(1.0)
        return self._random.choice(up)

    async def _run(self, replica: Replica, requests: Sequence[LabelRequest]) -> list[Result]:
        accident = self._draw(requests)
        names = {request.id for request in requests}
        seconds = self._random.uniform(0.5, 2.0 if names & self._schedule.killers else 20.0)
        work = asyncio.ensure_future(asyncio.sleep(seconds))
        await self._unless_ended(replica, work)
        if names & self._schedule.killers:
            self.deaths_by_rows += 1
            self._end(replica)
        elif accident == "die":
            self._end(replica)
        elif (names & self._schedule.hangers or accident == "stop") and not replica.stopped:
            self.deaths_by_rows += bool(names & self._schedule.hangers)
            replica.stopped = True
            asyncio.get_running_loop().call_later(WATCHDOG_SECONDS, self._end, replica)
        if replica.stopped or replica.ended.is_set():
            await replica.ended.wait()
            raise self._death(replica)
        if accident == "lose":
            await asyncio.Event().wait()
        if accident == "late":
            await asyncio.sleep(100_000.0)
        if accident == "raise":
            raise MemoryError("no memory for the arguments")
        results = [self._answer(request, failed=accident == "fail") for request in requests]
        if accident == "wrong":
            return self._spoil(results)
        if accident != "late":
            self.answered.update(names)
        return results

    def _draw(self, requests: Sequence[LabelRequest]) -> Accident | None:
        """At most one accident strikes the same row in calls of its own: two cannot be told from
        the row's own doing."""
        if not self._accidents or self._random.random() > 0.3:
            return None
        accident = self._random.choice(self._accidents)
        if len(requests) == 1:
            if accident == "fail" or self._struck[requests[0].id]:
                return None
            self._struck[requests[0].id] += 1
        self._accidents.remove(accident)
        return accident

    def _answer(self, request: LabelRequest, *, failed: bool) -> Result:
        if failed or request.id in self._schedule.failing:
            return Result(
                id=request.id,
                text=None,
                error_code="inference_failed",
                error_message="OutOfMemoryError",
                error_stage="infer",
            )
        return Result(id=request.id, text=f"text of {request.id}")

    def _spoil(self, results: list[Result]) -> list[Result]:
        how = self._random.randrange(4)
        if how == 0:
            return results[:-1]
        if how == 1:
            return [*results, results[0]]
        if how == 2:
            return [replace(result, id=f"other {result.id}") for result in results]
        return [*results[:-1], replace(results[-1], id="another row")]

    async def _unless_ended(self, replica: Replica, work: asyncio.Future[None]) -> None:
        ended = asyncio.ensure_future(replica.ended.wait())
        try:
            both: list[asyncio.Future[Any]] = [ended, work]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if not work.done():
                work.cancel()
        if replica.ended.is_set() or replica.stopped:
            await replica.ended.wait()
            raise self._death(replica)
        await work

    def _end(self, replica: Replica) -> None:
        if replica.ended.is_set():
            return
        replica.ended.set()
        self._replicas.remove(replica)
        loop = asyncio.get_running_loop()
        loop.call_later(RESTART_SECONDS, lambda: self._replicas.append(Replica()))

    @staticmethod
    def _death(replica: Replica) -> ActorDiedError:
        error = ActorDiedError()
        error.actor_id = replica.id
        return error
