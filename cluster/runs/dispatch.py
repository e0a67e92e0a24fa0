"""Dispatch: every row gets exactly one result in bounded time while a replica can work, whatever
replicas do: die, hang, refuse, answer late or wrongly.

A call without answers is sent again. From its last attempt on it is quarantined: it runs alone on
one replica, and then its rows one by one, while other replicas work. A row that kills replicas on
its own becomes `poison_row`; a row that the model failed on is asked a second time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import structlog

from cluster.errors import InferenceFailed, PoisonRow
from cluster.events import RunEvent
from cluster.protocol import BatchReplicas, BlockAnswers, LabelRequest, row_error_result
from cluster.runs.admission import Admission
from cluster.runs.call import KILLS, Ask, CallFault, FaultKind, send
from cluster.runs.death_budget import DeathBudget
from cluster.serving.deadline import Deadline
from sppruner.engine.interface import Result, SamplingParams

logger = structlog.get_logger(__name__)

# A row is poison only after so many replicas died under it alone: one death may have another cause.
_DEATHS_ALONE: Final = 2
# Wrong answers are rather the replica's fault: the row is asked until another one should have had
# its turn.
_FAULTS_ALONE: Final = 6
_MAX_PAUSE_SECONDS: Final = 10.0
_FIRST_SECONDS: Final = 3600.0
_LEAST_SECONDS: Final = 600.0
# Most rows of a control block that may fail one way alone: their time is in that arm, their answers
# are not.
_FAILED_SHARE: Final = 1 / 16

EventReport: TypeAlias = Callable[[RunEvent, int, str | None], None]
"""Hears what happened, how often, and to whom, where that is to be counted once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptedRow:
    """One row's result."""

    result: Result
    """The result, or the error that ended the row."""
    attempts: int
    """Calls in which the row was sent."""
    in_block: bool = False
    """Whether it was sent as one of a control block."""
    dense: Result | None = None
    """Its dense twin; None outside control blocks, and in one that was spoiled."""
    steady_seconds: float | None = None
    """What it took in the steady part of a block that was measured; None outside of it."""
    dense_steady_seconds: float | None = None
    """The same of its dense twin."""
    discarded_seconds: float = 0.0
    """Replica time that went into answers of the row which are not here."""


class Dispatcher:
    """Sends calls to replicas under one admission. One event loop owns an instance."""

    def __init__(
        self,
        replicas: BatchReplicas,
        *,
        admission: Admission,
        max_attempts: int,
        pause_seconds: float = 0.5,
        deadline: Deadline | None = None,
        budget: DeathBudget | None = None,
        report: EventReport = lambda kind, count, subject: None,
    ) -> None:
        """max_attempts: faults before a call is taken apart. pause_seconds: before the first
        retry; pauses double up to ten seconds, with jitter. deadline: for one call; by default an
        hour for the first and ten minutes or more for the others. report: hears what happened."""
        self._replicas = replicas
        self._admission = admission
        self._max_attempts = max_attempts
        self._pause_seconds = pause_seconds
        self._deadline = deadline or Deadline(first=_FIRST_SECONDS, least=_LEAST_SECONDS)
        self._budget = budget or DeathBudget()
        self._report = report
        self._quarantine = asyncio.Lock()
        self._answered_rows = 0
        self._answered_at = float("-inf")  # the loop's time
        self._known_good: LabelRequest | None = None
        self._dead: set[str] = set()

    async def dispatch(self, requests: Sequence[LabelRequest]) -> list[AttemptedRow]:
        """One result per request, in order. Raises FleetUnstable once replicas die, hang or answer
        wrongly and hardly answer anything else."""
        return await self._ask_failed_again(requests, await self._answer(requests))

    async def dispatch_block(
        self, requests: Sequence[LabelRequest], *, dense_first: bool, call_rows: int
    ) -> list[AttemptedRow]:
        """As `dispatch`, for a control block. Where it finds no replica that measures it, its rows
        are answered as any others, in calls of `call_rows`. Raises what `dispatch` raises."""
        measured: list[BlockAnswers] = []

        async def ask(rows: Sequence[LabelRequest]) -> list[Result]:
            measured[:] = [await self._replicas.label_block(rows, dense_first=dense_first)]
            return measured[0].pruned

        results = await self._attempt(requests, 1, ask=ask)
        if isinstance(results, CallFault):
            calls = [requests[at : at + call_rows] for at in range(0, len(requests), call_rows)]
            again = await asyncio.gather(*(self._answer(call, attempts=1) for call in calls))
            answers = [replace(row, in_block=True) for rows in again for row in rows]
        else:
            answers = _pair(requests, results, measured[0])
        return await self._ask_failed_again(requests, answers)

    async def _ask_failed_again(
        self, requests: Sequence[LabelRequest], rows: list[AttemptedRow]
    ) -> list[AttemptedRow]:
        failed = [n for n, row in enumerate(rows) if row.result.error_code == InferenceFailed.code]
        if failed:
            # What fails one row of a step fails all of them, and may pass: out of memory does.
            self._report(RunEvent.INFER_RETRIED, len(failed), None)
            again = (self._ask_again(requests[n], rows[n]) for n in failed)
            for n, row in zip(failed, await asyncio.gather(*again), strict=True):
                rows[n] = row
        return rows

    async def _ask_again(self, request: LabelRequest, failed: AttemptedRow) -> AttemptedRow:
        (row,) = await self._answer([request])
        return replace(
            row,
            attempts=row.attempts + failed.attempts,
            in_block=failed.in_block,
            discarded_seconds=failed.discarded_seconds + failed.result.seconds,
        )

    async def _answer(
        self, requests: Sequence[LabelRequest], attempts: int = 0
    ) -> list[AttemptedRow]:
        """First beside other calls, where a fault may be anybody's doing; then in quarantine.
        attempts: that ended in a fault before."""
        shared = max(1, self._max_attempts - 1)
        for attempt in range(attempts + 1, shared + 1):
            results = await self._attempt(requests, attempt)
            if not isinstance(results, CallFault):
                return [AttemptedRow(result=result, attempts=attempt) for result in results]
        async with self._quarantine:
            return await self._take_apart(requests, shared)

    async def _take_apart(
        self, requests: Sequence[LabelRequest], attempts: int
    ) -> list[AttemptedRow]:
        """Finds the rows that are at fault, by running them alone on a replica."""
        self._report(RunEvent.ROW_QUARANTINED, len(requests), None)
        if len(requests) > 1 and self._max_attempts > 1:
            results, attempts = await self._attempt_alone(requests, attempts)
            if not isinstance(results, CallFault):
                return [AttemptedRow(result=result, attempts=attempts) for result in results]
        return [await self._examine(request, attempts) for request in requests]

    async def _examine(self, request: LabelRequest, attempts: int) -> AttemptedRow:
        """The row's result, from calls of its own."""
        answered = self._answered_rows
        kills = faults = 0
        while True:
            outcome, attempts = await self._attempt_alone([request], attempts)
            if not isinstance(outcome, CallFault):
                return AttemptedRow(result=outcome[0], attempts=attempts)
            if not faults:
                answered = self._answered_rows
            faults += 1
            kills += outcome.kind in KILLS
            if kills < _DEATHS_ALONE and faults < _FAULTS_ALONE:
                continue
            if self._answered_rows == answered and not await self._answers_known_row():
                kills = faults = 0  # the fleet answers nothing at all: that is not this row's doing
                continue
            error: PoisonRow | InferenceFailed
            if kills >= _DEATHS_ALONE:
                error = PoisonRow(
                    f"{kills} replicas that ran it alone died or gave no answer in time, the last: "
                    f"{outcome.reason}; see their logs"
                )
            else:
                error = InferenceFailed(f"no replica answered it properly: {outcome.reason}")
            logger.error(error.code, row=request.id, attempts=attempts, error=outcome.reason)
            return AttemptedRow(result=row_error_result(request.id, error), attempts=attempts)

    async def _answers_known_row(self) -> bool:
        """Whether replicas answer a row that was answered before; without one, a plain question."""
        plain = LabelRequest(
            id="plain-question", prompt="Hello", generation=SamplingParams(max_new_tokens=1)
        )
        for _ in range(_DEATHS_ALONE):
            outcome, _ = await self._attempt_alone([self._known_good or plain], 0)
            if not isinstance(outcome, CallFault):
                return True
        return False

    async def _attempt_alone(
        self, requests: Sequence[LabelRequest], attempts: int
    ) -> tuple[list[Result] | CallFault, int]:
        """The results, or a fault that is these rows' own doing; and the calls so far."""
        while True:
            attempts += 1
            outcome = await self._attempt(requests, attempts, alone=True)
            if not isinstance(outcome, CallFault) or outcome.alone:
                return outcome, attempts

    async def _attempt(
        self,
        requests: Sequence[LabelRequest],
        attempt: int,
        *,
        alone: bool = False,
        ask: Ask | None = None,
    ) -> list[Result] | CallFault:
        """The results, or why there are none: after a pause, and paid from the budget. ask: see
        `send`."""
        if alone:
            self._budget.check()
            generation = self._budget.generation
            outcome = await self._send(requests, alone=True)
        else:
            size = sum(len(image or b"") for request in requests for image in request.images)
            # A refused call stays admitted while it waits: the next would only be refused too.
            async with self._admission.admit(len(requests), size, again=attempt > 1):
                self._budget.check()
                generation = self._budget.generation
                outcome = await self._send(requests, alone=False, ask=ask)
        if isinstance(outcome, CallFault):
            self._note(outcome, requests, attempt)
            hung = outcome.kind in (FaultKind.HUNG, FaultKind.REFUSED)
            reason = f"{outcome.reason} (row {requests[0].id} and {len(requests) - 1} more)"
            self._budget.spend(generation, reason, hung=hung)
            await self._pause(self._pause_seconds, attempt)
        return outcome

    async def _send(
        self, requests: Sequence[LabelRequest], *, alone: bool, ask: Ask | None = None
    ) -> list[Result] | CallFault:
        """Sends a call, as often as it is refused: until nothing was answered for as long as a call
        may take."""
        now = asyncio.get_running_loop().time
        first, refusals = now(), 0
        while True:
            sent, deadline = now(), self._deadline.seconds
            outcome = await send(self._replicas, requests, alone=alone, deadline=deadline, ask=ask)
            if not isinstance(outcome, CallFault):
                if ask is None and any(result.error_code is None for result in outcome):
                    # Rows that the model never saw say nothing about how long it takes, and blocks
                    # take longer.
                    self._deadline.observe(now() - sent)
                self._answered_at = now()
                self._note_answers(requests, outcome)
                return outcome
            overdue = now() - max(first, self._answered_at) > deadline
            if outcome.kind is not FaultKind.REFUSED or overdue:
                return outcome
            refusals += 1
            logger.debug("replica_full", refusals=refusals, error=outcome.reason)
            await self._pause(self._pause_seconds / 10, refusals)

    def _note_answers(self, requests: Sequence[LabelRequest], results: Sequence[Result]) -> None:
        self._answered_rows += len(results)
        self._admission.observe(requests, results)
        self._budget.refill(len(results))
        for request, result in zip(requests, results, strict=True):
            if result.error_code is None:
                self._known_good = request
                break

    def _note(self, fault: CallFault, requests: Sequence[LabelRequest], attempt: int) -> None:
        logger.warning(
            "replica_died" if fault.kind is FaultKind.DIED else "call_failed",
            fault=fault.kind.name.lower(),
            first_row=requests[0].id,
            rows=len(requests),
            attempt=attempt,
            alone=fault.alone,
            error=fault.reason,
        )
        self._report(RunEvent.CALL_RESENT, 1, None)
        if fault.kind is FaultKind.HUNG:
            self._report(RunEvent.CALL_TIMED_OUT, 1, None)
        if fault.replica is not None and fault.replica not in self._dead:
            self._dead.add(fault.replica)
            self._report(RunEvent.REPLICA_DIED, 1, fault.replica)

    async def _pause(self, first_seconds: float, times: int) -> None:
        longest = min(_MAX_PAUSE_SECONDS, first_seconds * 2 ** min(times - 1, 10))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))


def _pair(
    requests: Sequence[LabelRequest], results: Sequence[Result], block: BlockAnswers
) -> list[AttemptedRow]:
    """The rows of a block with their dense twins: those that were answered both ways, unless they
    are less than half of the block, or too many were answered one way alone."""
    twins = {result.id: result for result in block.dense or () if result.error_code is None}
    answered = {result.id for result in results if result.error_code is None}
    both = answered & twins.keys()
    one_way = len(answered ^ twins.keys())
    spoiled = (
        block.dense is None
        or 2 * len(both) < len(requests)
        or one_way > max(1, _FAILED_SHARE * len(requests))
    )
    pruned_steady = {} if spoiled else block.pruned_steady
    dense_steady = {} if spoiled else block.dense_steady
    discarded = block.discarded_seconds
    discarded += sum(
        result.seconds for result in block.dense or () if spoiled or result.id not in both
    )
    return [
        AttemptedRow(
            result=result,
            attempts=1,
            in_block=True,
            dense=twins[result.id] if result.id in both and not spoiled else None,
            steady_seconds=pruned_steady.get(result.id),
            dense_steady_seconds=dense_steady.get(result.id),
            discarded_seconds=discarded / len(requests),
        )
        for result in results
    ]
