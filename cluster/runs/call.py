"""One call to a replica: its deadline, and whether what came back are the answers to its rows.

Whatever a replica does, a call ends: with one result for each of its rows, or with a `CallFault`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, TypeAlias

import structlog

from cluster.protocol import BatchReplicas, LabelRequest, Priority
from cluster.serving.client import REPLICA_FULL, REPLICA_GONE
from sppruner.engine.interface import Result

logger = structlog.get_logger(__name__)


Ask: TypeAlias = Callable[[Sequence[LabelRequest]], Coroutine[Any, Any, list[Result]]]
"""A call of replicas: one result for each row."""


class FaultKind(Enum):
    """Why a call has no results."""

    REFUSED = auto()
    """The replica was full, or another call had it alone."""
    DIED = auto()
    """The replica died."""
    HUNG = auto()
    """No answer within the deadline. An answer that comes later is dropped."""
    WRONG = auto()
    """Results of other rows, too few or too many."""
    RAISED = auto()
    """An exception that no replica should raise."""


KILLS: Final = frozenset({FaultKind.DIED, FaultKind.HUNG})
"""Faults that cost a replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFault:
    """A call without results."""

    kind: FaultKind
    """What happened."""
    reason: str
    """The same, for people."""
    alone: bool = False
    """Whether nothing else ran on the replica: the fault is then these rows' own doing."""
    replica: str | None = None
    """Ray's id of the replica that died, where it is known."""


async def send(
    replicas: BatchReplicas,
    requests: Sequence[LabelRequest],
    *,
    alone: bool,
    deadline: float,
    ask: Ask | None = None,
) -> list[Result] | CallFault:
    """The results in the order of the requests, or why there are none. Raises nothing.

    alone: on a replica that runs nothing else meanwhile. deadline: seconds; they count again from
    when the call is alone, since before that it waits for others. ask: another call that gives
    their results.
    """
    began = asyncio.Event()
    if ask is not None:
        answer = ask(requests)
    elif alone:
        answer = _label_alone(replicas, requests, began)
    else:
        answer = replicas.label(requests, priority=Priority.BATCH)
    task = asyncio.ensure_future(answer)
    try:
        if alone:
            await _wait_for_either(task, began, deadline)
        if not alone or began.is_set():
            await asyncio.wait({task}, timeout=deadline)
    finally:
        # A call that is still running is given up here, whatever it does with that.
        hung = not task.done()
        if hung:
            task.add_done_callback(_drop)
            task.cancel()
    alone = began.is_set()
    if hung:
        return CallFault(kind=FaultKind.HUNG, reason=f"no answer in {deadline:.0f} s", alone=alone)
    if task.cancelled():
        return CallFault(kind=FaultKind.DIED, reason="the call was cancelled", alone=alone)
    error = task.exception()
    if error is None:
        return _match(requests, task.result(), alone=alone)
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, REPLICA_FULL):
        return CallFault(kind=FaultKind.REFUSED, reason=reason)
    if isinstance(error, REPLICA_GONE):
        return CallFault(
            kind=FaultKind.DIED,
            reason=type(error).__name__,
            alone=alone,
            replica=getattr(error, "actor_id", None),
        )
    logger.error("call_raised", first_row=requests[0].id, exc_info=error)
    return CallFault(kind=FaultKind.RAISED, reason=reason, alone=alone)


async def _label_alone(
    replicas: BatchReplicas, requests: Sequence[LabelRequest], began: asyncio.Event
) -> list[Result]:
    """began: set once the replica runs these rows alone."""
    results: list[Result] = []
    async for answer in replicas.label_alone(requests):
        if answer is None:
            began.set()
        else:
            results = answer
    return results


async def _wait_for_either(
    task: asyncio.Future[list[Result]], began: asyncio.Event, seconds: float
) -> None:
    beginning = asyncio.ensure_future(began.wait())
    try:
        both: set[asyncio.Future[Any]] = {task, beginning}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        beginning.cancel()


def _match(
    requests: Sequence[LabelRequest], results: Sequence[Result], *, alone: bool
) -> list[Result] | CallFault:
    """Each row's own result: rows and results are joined by id, never by position."""
    by_id = {result.id: result for result in results}
    if len(results) == len(by_id) and by_id.keys() == {request.id for request in requests}:
        return [by_id[request.id] for request in requests]
    reason = f"{len(results)} results that are not those of the {len(requests)} rows sent"
    return CallFault(kind=FaultKind.WRONG, reason=reason, alone=alone)


def _drop(task: asyncio.Future[list[Result]]) -> None:
    """Takes note of a late end, which asyncio would report as never retrieved."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("late_error_dropped", error=type(error).__name__)
