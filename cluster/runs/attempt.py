"""One attempt at a run: its open units are read, labelled and committed, in as many passes as bring
rows, and how that went is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import ray
from ray.data import DataContext, Dataset
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from cluster.accounting.control_plan import ControlPlan
from cluster.config import RunConfig
from cluster.controller import RunName, report_commit, report_event, stop_reason_now
from cluster.corpus.source import READER_CPUS, read_units
from cluster.corpus.unit import Unit
from cluster.errors import FleetUnavailable
from cluster.output.commit import CommitSink
from cluster.output.failed_rows import FailedRows, count_rows, select_rows
from cluster.output.manifest import Manifest
from cluster.output.replacement import RetrySink
from cluster.output.run_output import RunOutput
from cluster.output.summary import Attempt
from cluster.runs.labeller import LABELLER_CPUS, LabellerSettings, actors_for, label_units
from cluster.runs.progress import ProgressDisplay
from cluster.runs.replica_figures import busy_share, fleet_stats, with_deaths
from cluster.runs.replica_wait import PATIENCE_SECONDS
from cluster.runs.tracker import RunTracker
from cluster.serving.fleet import Fleet
from cluster.store.patience import hear_outages
from cluster.unexpected import as_run_error, run_error

_RAY_DATA_ERRORS: Final = (
    "ray.data._internal.execution.streaming_executor_state",
    "ray.data.exceptions",
)
# The sink serialises and uploads; a whole CPU reserved for it would starve the readers.
_SINK_CPUS: Final = 0.1
_LABELLER_STARTS: Final = 20
_CPU_POLL_SECONDS: Final = 2


def attempt_units(
    config: RunConfig,
    manifest: Manifest,
    todo: Sequence[Unit],
    output: RunOutput,
    fleet: Fleet,
    *,
    console: Console,
    began: float,
    failed: FailedRows,
) -> Attempt:
    """Labels and commits `todo`, or only the `failed` rows of these units. Units that their store
    did not give in any pass stay open.

    began: when the command did, by the monotonic clock. Raises the RunError that ended it.
    """
    _set_up_ray_data()
    if failed:
        # A few rows of each unit say nothing about whole batches, and it is known that they fail.
        config = replace(config, control_blocks=0, max_error_share=1.0)
    rows = count_rows(failed) or sum(unit.row_count for unit in todo)
    _announce(manifest, todo, rows, fleet, console)
    name = RunName(manifest.run_id, output.uri)
    control = _control_plan(config, manifest, fleet)
    if control.reason is not None and config.control_blocks != 0 and not config.spec.is_dense:
        little = (
            "is not measured" if not control.ranks else "is measured on less than was asked for"
        )
        console.print(f"the saving {little}: {control.reason}", highlight=False)
    first = set(control.first)
    todo = sorted(todo, key=lambda unit: unit.unit_id not in first)  # in their order otherwise
    settings = _labeller_settings(config, name, manifest, todo, rows, fleet, failed, control)
    actors = actors_for(fleet.target_replicas)
    _wait_for_cpus(console)
    report, committed = partial(report_event, name), partial(report_commit, name)
    sink: CommitSink | RetrySink = (
        RetrySink(manifest, output, on_commit=committed, on_event=report)
        if failed
        else CommitSink(
            manifest,
            output,
            on_commit=committed,
            on_event=report,
            stop_reason=partial(stop_reason_now, name) if config.is_guarded else None,
        )
    )
    with (
        RunTracker(config, manifest, output, again=failed, control=control) as tracker,
        hear_outages(report),
    ):
        before = fleet_stats(fleet)
        started = time.monotonic()
        with ProgressDisplay(tracker.progress, console):
            left = todo
            while left:
                units = read_units(
                    manifest.source,
                    manifest.mapping,
                    left,
                    replicas=fleet.target_replicas,
                    on_event=report,
                )
                if failed:
                    units = units.map_batches(
                        partial(select_rows, failed=failed),
                        batch_size=None,
                        batch_format="pyarrow",
                        num_cpus=READER_CPUS,  # the reader's: Ray Data runs both in one task
                    )
                _write(label_units(units, settings, actors=actors), sink, tracker)
                if failed:
                    left = []  # what its store did not give is failed as before: ask once more
                    break
                # Readers leave out units whose store gave up: they have another turn for as long
                # as that brings rows.
                done, asked = output.committed_units(), len(left)
                left = [unit for unit in left if unit.unit_id not in done]
                if len(left) == asked:
                    break
        wall = time.monotonic() - started
    if isinstance(sink, RetrySink):
        footers = output.footers(failed)
        retries = [retry for footer in footers for retry in footer.retries]
        rows = sum(retry.asked for retry in retries if retry.writer == sink.attempt)
    rows -= sum(unit.row_count for unit in left)
    after = fleet_stats(fleet)
    return Attempt(
        rows=rows,
        wall_seconds=wall,
        start_seconds=started - began,
        rows_per_second=rows / wall,
        replicas=fleet.replicas if after is None else len(after.replicas),
        replica_busy_share=busy_share(before, after),
        events=with_deaths(tracker.events, before, after),
        not_measured=None if failed or config.spec.is_dense else control.reason,
        asked_again=bool(failed),
    )


def _announce(
    manifest: Manifest, todo: Sequence[Unit], rows: int, fleet: Fleet, console: Console
) -> None:
    console.print(
        f"run {manifest.run_id}: {rows} rows in {len(todo)} units to do, "
        f"{len(manifest.units) - len(todo)} units done before; HTTP at {fleet.http_url}/v1",
        highlight=False,
        soft_wrap=True,
    )
    if manifest.unread_bytes:
        console.print(
            f"{manifest.unread_bytes:,} bytes of the input are damaged and not read: each range is "
            "an error row, archive_truncated; archive_damaged in the log names the files",
            style="yellow",
        )


def _control_plan(config: RunConfig, manifest: Manifest, fleet: Fleet) -> ControlPlan:
    units = ((unit.unit_id, unit.row_count) for unit in manifest.units)
    # A dense run is its own control.
    asked = 0 if config.spec.is_dense else config.control_blocks
    return ControlPlan.of(manifest.run_id, units, slots=fleet.slots, asked=asked)


def _labeller_settings(
    config: RunConfig,
    name: RunName,
    manifest: Manifest,
    todo: Sequence[Unit],
    rows: int,
    fleet: Fleet,
    failed: FailedRows,
    control: ControlPlan,
) -> LabellerSettings:
    """rows: of `todo`, or its failed ones alone."""
    size = sum(
        unit.size_bytes * len(failed.get(unit.unit_id, range(unit.row_count))) // unit.row_count
        for unit in todo
    )
    tokens = fleet.kv_token_capacity
    return LabellerSettings(
        name=name,
        config=config,
        control=control,
        model_revision=manifest.identity.settings["model_revision"],
        app=fleet.app,
        deployment=fleet.deployment,
        slots=fleet.slots,
        # Those that are still to come are counted: actors follow how many there are.
        replicas=fleet.target_replicas,
        kv_token_capacity=(
            None if tokens is None else tokens * fleet.target_replicas // fleet.replicas
        ),
        unit_rows=rows // len(todo),
        unit_bytes=size // len(todo),
    )


def _write(labelled: Dataset, sink: CommitSink | RetrySink, tracker: RunTracker) -> None:
    """Carries out the pipeline. Raises the RunError that ended it."""
    try:
        labelled.write_datasink(sink, ray_remote_args={"num_cpus": _SINK_CPUS})
    except Exception as error:
        # Ray wraps what its workers raise, and loses the cause where it pickles it twice.
        raise run_error(error) or tracker.stop_error() or as_run_error(error) from error


def _wait_for_cpus(console: Console, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Ray waits silently, and for ever, where a labeller and a reader do not fit beside what runs;
    with these a run goes on. Says so and raises FleetUnavailable once they did not for the
    patience."""
    parts = (LABELLER_CPUS, READER_CPUS)
    # A pending one is what an autoscaler starts a node for.
    room = placement_group([{"CPU": cpus} for cpus in parts])
    deadline = time.monotonic() + patience_seconds
    told = False
    try:
        while not room.wait(_CPU_POLL_SECONDS):  # a signal is heard between two waits
            free = ray.available_resources().get("CPU", 0.0)
            needs = (
                f"{free:.2f} CPUs of the cluster are free, and this run needs {parts[0]} and "
                f"{parts[1]} on a node beside its replicas"
            )
            advice = "fewer --replicas leave it more"
            if time.monotonic() > deadline:
                raise FleetUnavailable(f"{needs}, for {patience_seconds:.0f} s: {advice}")
            if not told:
                waits = "it waits until other work ends or a node joins"
                console.print(f"{needs}: {waits}; {advice}", style="yellow")
            told = True
    finally:
        remove_placement_group(room)


def _set_up_ray_data() -> None:
    """Ray Data's own bars and logs count blocks and operators; ours count rows. What a stage raises
    arrives here as it is: wrapped, it would lose the error that says what to do. It is told once,
    by the command, and not logged with Ray's stack before."""
    context = DataContext.get_current()
    context.raise_original_map_exception = True
    for name in _RAY_DATA_ERRORS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Ray Data ends what moved no whole unit for half an hour; a healthy unit may take longer, and
    # whatever hangs has a deadline of its own here.
    context.execution_no_progress_timeout_s = -1
    # A labeller that dies while it starts is replaced; it may be the fleet that is not there yet.
    context.max_consecutive_actor_init_deaths = _LABELLER_STARTS
    context.enable_progress_bars = False
    context.print_on_execution_start = False
