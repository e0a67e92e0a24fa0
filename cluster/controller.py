"""The run controller: one named, detached actor with a live view of the cluster's runs.

The view is a cache of committed output. A driver that starts or resumes registers its run with
what the store holds, so losing this actor loses nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import ray
import structlog
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster.accounting.control_plan import ControlPlan
from cluster.accounting.error_share import ErrorShare
from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import Block, measured_ratio
from cluster.events import IN_SECONDS, RunEvent
from cluster.metrics import Metrics

logger = structlog.get_logger(__name__)

CONTROLLER_NAME = "run-controller-7"
"""The actor's name. Its number is raised with every change of what is sent to it: the actor
outlives its creator, with that one's code."""
CONTROLLER_NAMESPACE = "sppruner"
"""The actor's Ray namespace."""
_ANSWER_SECONDS = 10.0
_ENDED_RUNS = 100  # that are still shown

RunState: TypeAlias = Literal[
    "running", "completed", "completed_with_errors", "incomplete", "failed", "stopped"
]


class RunName(NamedTuple):
    """A run in one output. Equal settings over one corpus are the same run wherever its rows go."""

    run_id: str
    """See `Identity.run_id`."""
    output: str
    """URI of the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """One run as of now."""

    run_id: str
    """See `Identity.run_id`."""
    state: RunState
    """What the run is doing, or how it ended."""
    units_done: int
    """Committed units."""
    units_total: int
    """Planned units."""
    rows_done: int
    """Committed rows."""
    rows_total: int
    """Planned rows."""
    rows_failed: Mapping[str, int]
    """Committed error rows by code."""
    rows_per_second: float
    """Of this attempt: rows that an earlier one committed do not count."""
    eta_seconds: float | None
    """Until the last commit at this speed; None until there is a speed."""
    visual_tokens: int
    """Of the committed rows, before pruning."""
    visual_tokens_kept: int
    """Of the committed rows, after pruning."""
    seconds: float
    """Replica time of the committed rows."""
    flops: int
    """Modelled FLOPs of the committed rows."""
    flops_dense: int
    """Modelled FLOPs of the committed rows, unpruned."""
    meta: Mapping[str, Any]
    """Kind, output, model and spec."""
    events: Mapping[str, int] = field(default_factory=dict)
    """Of this attempt, by kind (`cluster.events.RunEvent`)."""


@dataclass(slots=True, kw_only=True)
class _Run:
    state: RunState
    again: frozenset[str]
    beside: bool
    meta: Mapping[str, Any]
    units_total: int
    rows_total: int
    errors: ErrorShare
    control: ControlPlan | None
    units_done: set[str]
    ledger: UnitLedger
    rows_before: int
    started: float
    events: Counter[str] = field(default_factory=Counter)
    told: set[tuple[str, str]] = field(default_factory=set)
    waited: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    waited_until: dict[str, float] = field(default_factory=dict)
    finished: float | None = None
    granted: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    measured: dict[str, Block] = field(default_factory=dict)


class RunController:
    """A plain class; `get_controller` makes an actor of it. Every call may be sent again."""

    def __init__(self) -> None:
        self._runs: dict[RunName, _Run] = {}
        self._metrics = Metrics()
        self._codes: set[str] = set()

    def register(
        self,
        name: RunName,
        *,
        meta: Mapping[str, Any],
        units_total: int,
        rows_total: int,
        units_done: list[str],
        ledger_so_far: UnitLedger,
        max_error_share: float,
        error_share_after: int,
        again: Collection[str] = (),
        control: ControlPlan | None = None,
        lost: Collection[str] = (),
        measured: Mapping[str, Block] | None = None,
    ) -> None:
        """Starts or restarts the view of a run, from what the store says is committed. again: units
        whose failed rows are asked again, perhaps while the run's own job goes on: its guard stays,
        and what becomes of these units is nothing that the guard counts. lost, measured: of the
        committed units, for `ControlPlan.allows`."""
        errors = ErrorShare(most=max_error_share, after=error_share_after, run_rows=rows_total)
        before = self._runs.get(name)
        beside = None
        if again and before is not None and before.state == "running":
            errors = before.errors
            beside = before if before.beside or not before.again else None
        ended = [known for known, run in self._runs.items() if run.finished is not None]
        for known in ended[: max(0, len(ended) - _ENDED_RUNS)]:
            del self._runs[known]
        run = self._runs[name] = _Run(
            state="running",
            again=frozenset(again),
            beside=beside is not None,
            meta=dict(meta),
            units_total=units_total,
            rows_total=rows_total,
            errors=errors,
            control=control,
            lost=set(lost),
            measured=dict(measured or {}),
            units_done=set(units_done),
            ledger=ledger_so_far,
            rows_before=ledger_so_far.rows,
            started=time.monotonic(),
        )
        if beside is not None:  # the job's own attempt goes on
            run.started, run.rows_before = beside.started, beside.rows_before
            run.control, run.granted = beside.control, beside.granted
            run.lost, run.measured = beside.lost, beside.measured
            run.events, run.told = beside.events, beside.told
            run.waited, run.waited_until = beside.waited, beside.waited_until
        self._export(name)

    def unit_committed(self, name: RunName, unit_id: str, ledger: UnitLedger) -> bool:
        """Counts a committed unit once, however often it is reported. False: the run is unknown
        (this actor restarted), and its driver should register it again."""
        run = self._runs.get(name)
        if run is None:
            return False
        if unit_id not in run.units_done:
            run.units_done.add(unit_id)
            run.granted.discard(unit_id)
            if ledger.blocks:
                run.measured[unit_id] = ledger.blocks[0]
            elif run.control is not None and run.control.loses(unit_id, ledger):
                run.lost.add(unit_id)
            run.ledger += ledger
            if unit_id not in run.again:
                run.errors.add(ledger)
            self._export(name)
        return True

    def event(self, name: RunName, kind: str, count: int = 1, subject: str | None = None) -> None:
        """Adds to the run's count of an event; an unknown run's are dropped. subject: whom it
        happened to, who counts once, however many tell of it. Of kinds in seconds it is the time
        until now: what several tell of the same time counts once."""
        run = self._runs.get(name)
        if run is None or (subject is not None and (kind, subject) in run.told):
            return
        if subject is not None:
            run.told.add((kind, subject))
        if kind not in IN_SECONDS:
            run.events[kind] += count
            return
        now = time.monotonic()
        run.waited[kind] += min(float(count), now - run.waited_until.get(kind, run.started))
        run.waited_until[kind] = now

    def finish(self, name: RunName, state: RunState, *, again: bool = False) -> RunProgress | None:
        """Ends the view of the run, and returns it; "completed" with failed rows is
        "completed_with_errors". None for a run that is not registered. again: a command ended that
        asked failed rows again; a job that runs beside it goes on, whichever came first."""
        run = self._runs.get(name)
        if run is None:
            return None
        if state == "completed" and run.ledger.rows_failed:
            state = "completed_with_errors"
        if not again or (run.again and not run.beside):
            run.state, run.finished = state, time.monotonic()
        self._export(name)
        return self.progress(name)

    def stop_reason(self, name: RunName) -> str | None:
        """Why the run should stop: too many rows of this attempt failed. None: go on."""
        run = self._runs.get(name)
        if run is None or run.errors.reason is None:
            return None
        return f"run {name.run_id}: {run.errors.reason}"

    def may_measure(self, name: RunName, unit_id: str) -> bool:
        """Whether the control block of a unit is to be measured. What is allowed counts as spent
        until the unit is committed."""
        run = self._runs.get(name)
        if run is None or run.control is None or unit_id in run.units_done:
            return False
        allowed = unit_id in run.granted or run.control.allows(
            unit_id, run.ledger, run.granted, run.lost, run.measured
        )
        if allowed:
            run.granted.add(unit_id)
        return allowed

    def progress(self, name: RunName) -> RunProgress | None:
        """None for a run that is not registered."""
        run = self._runs.get(name)
        if run is None:
            return None
        elapsed = (run.finished or time.monotonic()) - run.started
        new = max(0, run.ledger.rows - run.rows_before)
        speed = new / elapsed if elapsed > 0 else 0.0
        left = max(0, run.rows_total - run.ledger.rows)
        return RunProgress(
            run_id=name.run_id,
            state=run.state,
            units_done=len(run.units_done),
            units_total=run.units_total,
            rows_done=run.ledger.rows,
            rows_total=run.rows_total,
            rows_failed=dict(run.ledger.failed),
            rows_per_second=speed,
            eta_seconds=left / speed if speed > 0 else None,
            visual_tokens=run.ledger.visual_tokens,
            visual_tokens_kept=run.ledger.visual_tokens_kept,
            seconds=run.ledger.seconds,
            flops=sum(run.ledger.flops.values()),
            flops_dense=sum(run.ledger.flops_dense.values()),
            meta=run.meta,
            events={**run.events, **{kind: round(s) for kind, s in run.waited.items()}},
        )

    def runs(self) -> list[RunProgress]:
        """Every registered run, in order of registration."""
        known = (self.progress(name) for name in self._runs)
        return [progress for progress in known if progress is not None]

    def _export(self, name: RunName) -> None:
        """The run's metrics, as of now."""
        run, progress = self._runs[name], self.progress(name)
        # Equal settings over one corpus are the same run wherever its rows go.
        of = {"run": f"{name.run_id}-{hashlib.sha256(name.output.encode()).hexdigest()[:6]}"}
        assert progress is not None
        ledger, export = run.ledger, self._metrics.set
        counts = {
            "planned": run.rows_total,
            "succeeded": ledger.rows - ledger.rows_failed,
            "failed": ledger.rows_failed,
        }
        for status, rows in counts.items():
            export("run_rows", rows, status=status, **of)
        self._codes |= ledger.failed.keys()  # what is mended goes back to none
        for code in self._codes:
            export("run_errors", ledger.failed.get(code, 0), code=code, **of)
        export("run_visual_tokens", ledger.visual_tokens, state="input", **of)
        export("run_visual_tokens", ledger.visual_tokens_kept, state="kept", **of)
        export("run_seconds", ledger.seconds, mode="rows", **of)
        export("run_seconds", ledger.control_seconds, mode="control", **of)
        export("run_seconds", ledger.retry_seconds, mode="retried", **of)
        export("run_rows_per_second", progress.rows_per_second, **of)
        blocks, kinds = list(run.measured.values()), ledger.nanoseconds_by_device
        found = measured_ratio(blocks, seconds=kinds)
        for bound in ("ratio", "low", "high"):
            if found is not None and getattr(found, bound) is not None:
                export("run_saving_ratio", getattr(found, bound), bound=bound, **of)


def get_controller() -> ActorHandle[RunController]:
    """The cluster's controller, created if there is none. It outlives its creator."""
    remote = ray.remote(RunController).options(
        name=CONTROLLER_NAME,
        namespace=CONTROLLER_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
    )
    handle: ActorHandle[RunController] = remote.remote()
    return handle


def report_commit(name: RunName, unit_id: str, ledger: UnitLedger) -> None:
    """Tells the controller of a commit. Neither waits nor raises: the committed object counts."""
    _tell("unit_committed", name, unit_id, ledger)


def report_event(name: RunName, kind: RunEvent, count: int = 1, subject: str | None = None) -> None:
    """Adds `count` to the run's count of an event, from any process. Neither waits nor raises.

    A kind that is counted in seconds takes whole seconds. subject: see `RunController.event`.
    """
    _tell("event", name, str(kind), count, subject)


def _tell(method: str, *arguments: Any) -> None:
    """Calls the controller without waiting for it. Never raises: what is told is telemetry."""
    try:
        controller = _find_controller()
        if controller is not None:
            getattr(controller, method).remote(*arguments)
    except Exception as error:  # of a Ray that is going away, in whatever state
        logger.warning("controller_unreachable", call=method, error=type(error).__name__)


async def stop_reason(name: RunName) -> str | None:
    """The controller's answer; None where it is unreachable, since a run needs no controller."""
    controller = _find_controller()
    if controller is None:
        return None
    try:
        answer = controller.stop_reason.remote(name)
        reason: str | None = await asyncio.wait_for(answer, _ANSWER_SECONDS)
    except (RayError, TimeoutError) as error:
        logger.warning("controller_unreachable", run_id=name.run_id, error=type(error).__name__)
        return None
    return reason


async def may_measure(name: RunName, unit_id: str) -> bool:
    """The controller's answer; False where it is unreachable, since rows need no measurement."""
    controller = _find_controller()
    if controller is None:
        return False
    try:
        asked = controller.may_measure.remote(name, unit_id)
        return bool(await asyncio.wait_for(asked, _ANSWER_SECONDS))
    except (RayError, TimeoutError) as error:
        logger.warning("controller_unreachable", run_id=name.run_id, error=type(error).__name__)
        return False


def stop_reason_now(name: RunName) -> str | None:
    """`stop_reason` for callers without an event loop."""
    controller = _find_controller()
    if controller is None:
        return None
    try:
        reason: str | None = ray.get(controller.stop_reason.remote(name), timeout=_ANSWER_SECONDS)
    except RayError as error:
        logger.warning("controller_unreachable", run_id=name.run_id, error=type(error).__name__)
        return None
    return reason


async def list_runs() -> list[RunProgress]:
    """The registered runs; empty where the controller is unreachable."""
    controller = _find_controller()
    if controller is None:
        return []
    try:
        runs: list[RunProgress] = await asyncio.wait_for(controller.runs.remote(), _ANSWER_SECONDS)
    except (RayError, TimeoutError) as error:
        logger.warning("controller_unreachable", error=type(error).__name__)
        return []
    return runs


def _find_controller() -> ActorHandle[RunController] | None:
    # Outside Ray, get_actor would start a local Ray.
    if not ray.is_initialized():
        return None
    try:
        found: ActorHandle[RunController] = ray.get_actor(
            CONTROLLER_NAME, namespace=CONTROLLER_NAMESPACE
        )
    except (RayError, ValueError):
        return None
    return found
