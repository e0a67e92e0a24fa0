"""One run, from settings to summary: plan, drop what is done, label the rest, report.

Nothing here is state: what a run has done is what its output holds, so the same call after any
crash goes on where the last commit left off.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import ray
from ray.data import DataContext
from rich.console import Console

from cluster.config import RunConfig
from cluster.controller import report_commit
from cluster.corpus.source import READER_CPUS, read_units
from cluster.corpus.unit import Unit
from cluster.errors import UsageError
from cluster.output.commit import CommitSink
from cluster.output.summary import SUMMARY_KEY, Attempt, Summary, summarise
from cluster.protocol import ServeReplicas
from cluster.runs.calibration import calibrate
from cluster.runs.labeller import LABELLER_CPUS, LabellerSettings, label_units
from cluster.runs.planning import Plan, done_units, plan_run
from cluster.runs.progress import ProgressDisplay
from cluster.runs.tracker import RunTracker, run_error
from cluster.serving.fleet import Fleet, FleetSettings, open_fleet
from cluster.serving.replica import EngineSettings
from cluster.store import Store, open_store
from sppruner.adapters import capabilities
from sppruner.errors import SpprunerError
from sppruner.models.loading import image_backend, load_config, load_processor, resolve_model
from sppruner.pruner import check_spec
from sppruner.selectors import selector_for

EXIT_DONE, EXIT_ERROR_ROWS = 0, 3

# The sink serialises and uploads; a whole CPU reserved for it would starve the readers.
_SINK_CPUS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command needs for its end. note: what was special about this attempt, for people."""

    summary: Summary
    note: str | None

    @property
    def exit_code(self) -> int:
        return EXIT_ERROR_ROWS if self.summary.total.rows_failed else EXIT_DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pinned:
    revision: str
    image_backend: str


def run(
    config: RunConfig, *, console: Console, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Carries out or resumes the run `config` describes. `environment` is for Ray's workers where
    they do not inherit this process's.

    Raises UsageError before any compute is spent, other RunErrors after; committed units stay.
    """
    began = time.monotonic()
    pinned = _pin(config)
    plan = plan_run(config, model_revision=pinned.revision, image_backend=pinned.image_backend)
    store = open_store(config.output)
    done = done_units(store)
    todo = [unit for unit in plan.units if unit.unit_id not in done]
    if not todo:
        summary = summarise(config.output)
        if store.head(SUMMARY_KEY) is None:  # the driver died between the last commit and here
            store.put(SUMMARY_KEY, summary.to_json().encode())
        return Outcome(summary=summary, note="finished before: nothing was left to do")

    with open_fleet(fleet_of(config, pinned.revision, environment or {})) as fleet:
        if fleet.image_backend != pinned.image_backend:
            raise UsageError(
                f"replicas decode with {fleet.image_backend}, this machine with "
                f"{pinned.image_backend}: install torchvision on both or on neither"
            )
        if config.auto:
            replicas, batch_rows = ServeReplicas(fleet.handle), fleet.slots
            chosen = calibrate(config, plan, todo, store, replicas, batch_rows=batch_rows)
            config = replace(config, spec=chosen.spec(config.spec), auto=False)
        attempt = _label(config, plan, todo, store, fleet, pinned, console, began)
    summary = summarise(config.output, attempt)
    store.put(SUMMARY_KEY, summary.to_json().encode())
    resumed = len(plan.units) - len(todo)
    note = f"resumed: {resumed} of {len(plan.units)} units were done before" if resumed else None
    return Outcome(summary=summary, note=note)


def fleet_of(config: RunConfig, revision: str, environment: Mapping[str, str]) -> FleetSettings:
    """The replicas that a run asks for."""
    engine = EngineSettings(
        model=config.model,
        revision=revision,
        slots=config.slots,
        dtype=config.dtype,
    )
    return FleetSettings(engine=engine, replicas=config.replicas, environment=environment)


def _pin(config: RunConfig) -> _Pinned:
    """The model's exact content and everything about the spec that can be checked without it."""
    try:
        selector_for(config.spec)  # a misspelt method must not cost the download of a model
        identity = resolve_model(config.model)
        check_spec(config.spec, capabilities(load_config(identity)))
        backend = image_backend(load_processor(identity))
    except SpprunerError as error:
        raise UsageError(str(error)) from error
    return _Pinned(revision=identity.revision, image_backend=backend)


def _label(
    config: RunConfig,
    plan: Plan,
    todo: list[Unit],
    store: Store,
    fleet: Fleet,
    pinned: _Pinned,
    console: Console,
    began: float,
) -> Attempt:
    """Labels and commits `todo`."""
    _quiet_ray_data()
    console.print(
        f"run {plan.run_id}: {sum(u.row_count for u in todo)} rows in {len(todo)} units to do, "
        f"{len(plan.units) - len(todo)} units done before; HTTP at {fleet.http_url}/v1",
        highlight=False,
        soft_wrap=True,
    )
    caller = LabellerSettings(
        run_id=plan.run_id,
        first_unit=plan.units[0].unit_id,
        config=config,
        model_revision=pinned.revision,
        app=fleet.app,
        deployment=fleet.deployment,
        batch_rows=fleet.slots,
        replicas=fleet.replicas,
        kv_token_capacity=fleet.kv_token_capacity,
        unit_rows=sum(unit.row_count for unit in todo) // len(todo),
    )
    _warn_if_starved(console)
    labelled = label_units(read_units(plan, todo, replicas=fleet.replicas), caller)
    sink = CommitSink(plan, on_commit=report_commit)
    with RunTracker(config, plan, store) as watch:
        busy_before = fleet.stats().busy_seconds
        started = time.monotonic()
        with ProgressDisplay(watch.progress, console):
            try:
                labelled.write_datasink(sink, ray_remote_args={"num_cpus": _SINK_CPUS})
            except Exception as error:
                cause = run_error(error)  # Ray wraps what its workers raise
                if cause is None:
                    raise
                raise cause from error
        wall = time.monotonic() - started
    rows = sum(unit.row_count for unit in todo)
    return Attempt(
        rows=rows,
        wall_seconds=wall,
        start_seconds=started - began,
        rows_per_second=rows / wall,
        replicas=fleet.replicas,
        replica_busy_share=_busy_share(fleet, busy_before, wall),
    )


def _busy_share(fleet: Fleet, busy_before: float, wall: float) -> float | None:
    """None if a replica was replaced on the way: its counter started anew."""
    spent = fleet.stats().busy_seconds - busy_before
    return spent / (wall * fleet.replicas) if spent >= 0 else None


def _warn_if_starved(console: Console) -> None:
    """Ray waits without a word where reading, calling and writing do not fit beside what runs."""
    free = ray.available_resources().get("CPU", 0.0)
    needed = READER_CPUS + LABELLER_CPUS + _SINK_CPUS
    if free < needed:
        console.print(
            f"only {free:.2f} CPUs of the cluster are free and this run needs {needed:.2f} beside "
            "its replicas: it waits until other work ends or a node joins",
            style="yellow",
        )


def _quiet_ray_data() -> None:
    """Ray Data's own bars and logs count blocks and operators; ours count rows and money."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
