"""Dispatch: every row gets exactly one result while replicas die, restart and refuse.

A full replica is retried for as long as it takes. A call whose replica dies is sent again. After
`max_attempts` deaths the call is quarantined: it runs exclusively, so that a death is its own
doing, and is bisected until the one row that kills replicas is found. That row becomes
`poison_row`; its neighbours, and calls that merely shared a replica with it, do not.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from cluster.errors import PoisonRow
from cluster.protocol import LabelRequest, Priority, Replicas, row_error_result
from cluster.runs.admission import Admission
from cluster.serving.client import REPLICA_FULL, REPLICA_GONE
from sppruner.engine.interface import Result

logger = structlog.get_logger(__name__)

# A single row is poison only after so many replicas died under it alone: one death in quarantine
# may still have another cause.
_DEATHS_ALONE: Final = 2
_MAX_PAUSE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptedRow:
    """One row's result."""

    result: Result
    """The result, or the error that ended the row."""
    attempts: int
    """Calls in which the row was sent."""


class Dispatcher:
    """Sends calls to replicas under one admission. One event loop owns an instance."""

    def __init__(
        self,
        replicas: Replicas,
        *,
        admission: Admission,
        max_attempts: int,
        pause_seconds: float = 0.5,
    ) -> None:
        """max_attempts: deaths before a call is quarantined. pause_seconds: before the first
        retry; pauses double up to ten seconds, with jitter."""
        self._replicas = replicas
        self._admission = admission
        self._max_attempts = max_attempts
        self._pause_seconds = pause_seconds

    async def dispatch(self, requests: Sequence[LabelRequest]) -> list[AttemptedRow]:
        """One result per request, in order. Raises only what is neither a death nor a refusal."""
        for attempt in range(1, self._max_attempts + 1):
            results = await self._try(requests, attempt)
            if results is not None:
                return [AttemptedRow(result=result, attempts=attempt) for result in results]
        return await self._quarantine(requests, self._max_attempts)

    async def _quarantine(
        self, requests: Sequence[LabelRequest], attempts: int
    ) -> list[AttemptedRow]:
        for _ in range(_DEATHS_ALONE if len(requests) == 1 else 1):
            attempts += 1
            results = await self._try(requests, attempts, exclusive=True)
            if results is not None:
                return [AttemptedRow(result=result, attempts=attempts) for result in results]
        if len(requests) == 1:
            logger.error("poison_row", row=requests[0].id, attempts=attempts)
            poison = PoisonRow(f"killed {_DEATHS_ALONE} replicas on its own; see their logs")
            return [
                AttemptedRow(result=row_error_result(requests[0].id, poison), attempts=attempts)
            ]
        half = len(requests) // 2
        first = await self._quarantine(requests[:half], attempts)
        return first + await self._quarantine(requests[half:], attempts)

    async def _try(
        self, requests: Sequence[LabelRequest], attempt: int, *, exclusive: bool = False
    ) -> list[Result] | None:
        """The results, or None if the replica died. A refused call stays admitted while it waits:
        admitting the next one would only have it refused too."""
        refusals = 0
        async with self._admission.admit(len(requests), exclusive=exclusive):
            while True:
                try:
                    results = await self._replicas.label(requests, priority=Priority.BATCH)
                    self._admission.observe(requests, results)
                    return results
                except REPLICA_FULL as error:
                    refusals += 1
                    logger.debug("replica_full", refusals=refusals, error=str(error))
                    await self._pause(self._pause_seconds / 10, refusals)
                except REPLICA_GONE as error:
                    logger.warning(
                        "replica_died",
                        first_row=requests[0].id,
                        rows=len(requests),
                        attempt=attempt,
                        alone=exclusive,
                        error=type(error).__name__,
                    )
                    break
        await self._pause(self._pause_seconds, attempt)
        return None

    async def _pause(self, first_seconds: float, times: int) -> None:
        longest = min(_MAX_PAUSE_SECONDS, first_seconds * 2 ** min(times - 1, 10))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))
