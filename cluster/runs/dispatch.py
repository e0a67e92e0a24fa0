"""Gets every row answered exactly once while replicas die, restart and refuse.

A busy or full replica is asked again, for as long as it takes. A call whose replica dies is sent
again; after `max_attempts` deaths it goes into quarantine: it runs alone, so that what dies with
it is its own doing, and is halved until the one row that kills replicas is found. That row
becomes `poison_row`; its neighbours, and calls that merely shared a replica with it, do not.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from cluster.errors import Busy, PoisonRow
from cluster.protocol import LabelRequest, Priority, Replicas, RowAnswer
from cluster.runs.admission import Admission

logger = structlog.get_logger(__name__)

REPLICA_GONE = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    ReplicaUnavailableError,
)
REPLICA_FULL = (Busy, BackPressureError)

# A single row is called poison only after it has killed this many replicas all by itself: one
# death in quarantine may still be somebody else's doing.
_DEATHS_ALONE = 2
_LONGEST_PAUSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptedRow:
    """The answer to one row, and in how many calls the row was sent."""

    answer: RowAnswer
    attempts: int


class Dispatcher:
    """Sends calls to replicas under one set of credits. One event loop owns it."""

    def __init__(
        self,
        replicas: Replicas,
        *,
        credits: Admission,
        max_attempts: int,
        pause_seconds: float = 0.5,
    ) -> None:
        self._replicas = replicas
        self._credits = credits
        self._max_attempts = max_attempts
        self._pause_seconds = pause_seconds

    async def deliver(self, calls: Sequence[LabelRequest]) -> list[AttemptedRow]:
        """One answer per call, in order. Raises only what is neither a death nor a refusal."""
        for attempt in range(1, self._max_attempts + 1):
            answers = await self._try(calls, attempt)
            if answers is not None:
                return [AttemptedRow(answer=answer, attempts=attempt) for answer in answers]
        return await self._quarantine(calls, self._max_attempts)

    async def _quarantine(self, calls: Sequence[LabelRequest], attempts: int) -> list[AttemptedRow]:
        for _ in range(_DEATHS_ALONE if len(calls) == 1 else 1):
            attempts += 1
            answers = await self._try(calls, attempts, alone=True)
            if answers is not None:
                return [AttemptedRow(answer=answer, attempts=attempts) for answer in answers]
        if len(calls) == 1:
            logger.error("poison_row", row=calls[0].id, attempts=attempts)
            poison = PoisonRow(f"killed {_DEATHS_ALONE} replicas on its own; see their logs")
            answer = RowAnswer.from_error(calls[0].id, poison)
            return [AttemptedRow(answer=answer, attempts=attempts)]
        half = len(calls) // 2
        left = await self._quarantine(calls[:half], attempts)
        return left + await self._quarantine(calls[half:], attempts)

    async def _try(
        self, calls: Sequence[LabelRequest], attempt: int, *, alone: bool = False
    ) -> list[RowAnswer] | None:
        """The answers, or None if the replica died. A refused call keeps its place while it
        waits: letting the next one try would only be refused too."""
        refusals = 0
        async with self._credits.place(len(calls), alone=alone):
            while True:
                try:
                    answers = await self._replicas.label(calls, priority=Priority.BATCH)
                    self._credits.learn(calls, answers)
                    return answers
                except REPLICA_FULL as error:
                    refusals += 1
                    logger.debug("replica_full", refusals=refusals, error=str(error))
                    await self._pause(self._pause_seconds / 10, refusals)
                except REPLICA_GONE as error:
                    logger.warning(
                        "replica_died",
                        first_row=calls[0].id,
                        rows=len(calls),
                        attempt=attempt,
                        alone=alone,
                        error=type(error).__name__,
                    )
                    break
        await self._pause(self._pause_seconds, attempt)
        return None

    async def _pause(self, first_seconds: float, times: int) -> None:
        longest = min(_LONGEST_PAUSE_SECONDS, first_seconds * 2 ** min(times - 1, 10))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))
