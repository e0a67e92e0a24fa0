"""One run, from settings to summary: plan, skip what is committed, label the rest, summarise.

A run has no state besides its output. The same call after any crash resumes where the last commit
ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import ray
import structlog
from ray.data import DataContext, Dataset
from rich.console import Console

from cluster.config import RunConfig
from cluster.console import open_console
from cluster.controller import report_commit, report_event, stop_reason_now
from cluster.corpus.source import READER_CPUS, read_units
from cluster.corpus.unit import Unit
from cluster.errors import UsageError
from cluster.output.commit import CommitSink
from cluster.output.failed_rows import ErrorChoice, FailedRows, find_failed_rows, select_rows
from cluster.output.manifest import Manifest
from cluster.output.replacement import RetrySink
from cluster.output.run_output import RunOutput
from cluster.output.summary import Attempt, Summary, keep_summary, summarise
from cluster.runs.calibration import calibrate
from cluster.runs.labeller import LABELLER_CPUS, LabellerSettings, actors_for, label_units
from cluster.runs.planning import plan_run
from cluster.runs.progress import ProgressDisplay
from cluster.runs.tracker import RunTracker, run_error
from cluster.serving.application import FleetSettings
from cluster.serving.client import ServeReplicas
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, FleetStats, open_fleet
from sppruner.adapters import capabilities
from sppruner.errors import SpprunerError
from sppruner.models.loading import image_backend, load_config, load_processor, resolve_model
from sppruner.pruner import check_spec
from sppruner.selectors import selector_for

logger = structlog.get_logger(__name__)

_RAY_DATA_STATE = "ray.data._internal.execution.streaming_executor_state"
EXIT_DONE, EXIT_ERROR_ROWS, EXIT_INCOMPLETE = 0, 3, 5

# The sink serialises and uploads; a whole CPU reserved for it would starve the readers.
_SINK_CPUS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of one attempt, as a command reports it."""

    summary: Summary
    """The run as of now."""
    note: str | None
    """What was special about this attempt, for people; None for nothing."""

    @property
    def exit_code(self) -> int:
        """0, 3 for a run with error rows, or 5 for one whose units are not all committed."""
        if self.summary.state == "incomplete":
            return EXIT_INCOMPLETE
        return EXIT_ERROR_ROWS if self.summary.total.rows_failed else EXIT_DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class _PinnedModel:
    revision: str
    image_backend: str


def run(
    config: RunConfig,
    *,
    console: Console | None = None,
    environment: Mapping[str, str] | None = None,
    retry: ErrorChoice | None = None,
) -> Outcome:
    """Carries out or resumes the run that `config` describes, or asks its failed rows again.

    console: where progress goes; None for stderr. environment: variables for Ray's workers, where
    they do not inherit this process's. retry: failed rows to label again, in place of what is not
    committed yet. Raises UsageError before any compute is spent, other RunErrors later; committed
    units stay.
    """
    began = time.monotonic()
    console = console or open_console(stderr=True)
    output = RunOutput.open(config.output)
    revision = None
    if retry is not None:  # rows of one run are of one model, whatever its name leads to by now
        revision = output.require_manifest().identity.settings["model_revision"]
    model = _pin_model(config, revision)
    manifest = plan_run(
        config, output, model_revision=model.revision, image_backend=model.image_backend
    )
    failed: FailedRows = {}
    if retry is None:
        done = output.committed_units()
        todo = [unit for unit in manifest.units if unit.unit_id not in done]
    else:
        failed = find_failed_rows(output, manifest, retry)
        todo = [unit for unit in manifest.units if unit.unit_id in failed]
    warn_of_foreign_objects(output, manifest, console)
    output.describe_data_files()
    if not todo:
        summary = summarise(output)
        if not output.has_summary():  # the driver died between the last commit and here
            keep_summary(output, summary)
        nothing = "finished before: nothing was left to do"
        return Outcome(summary=summary, note=nothing if retry is None else "no row to ask again")
    output.check_first_writer_wins()

    with open_fleet(fleet_settings(config, model.revision, environment or {})) as fleet:
        if fleet.image_backend != model.image_backend:
            raise UsageError(
                f"replicas decode with {fleet.image_backend}, this machine with "
                f"{model.image_backend}: install torchvision on both or on neither"
            )
        if config.auto:
            replicas = ServeReplicas(fleet.handle)
            decision = calibrate(config, manifest, todo, output, replicas, slots=fleet.slots)
            config = replace(config, spec=decision.spec(config.spec), auto=False)
        attempt = _label(config, manifest, todo, output, fleet, console, began, failed)
    summary = summarise(output, attempt)
    keep_summary(output, summary)
    return Outcome(summary=summary, note=_note(manifest, todo, failed, summary))


def _note(
    manifest: Manifest, todo: Sequence[Unit], failed: FailedRows, summary: Summary
) -> str | None:
    if failed:
        return f"{_count(failed)} failed rows of {len(failed)} units were asked again"
    resumed = len(manifest.units) - len(todo)
    notes = []
    if resumed:
        notes.append(f"resumed: {resumed} of {len(manifest.units)} units were done before")
    missing = summary.units - summary.units_done
    if missing:
        notes.append(
            f"{missing} units are missing, {manifest.source} did not give them: once it answers, "
            "the same command labels them"
        )
    return "; ".join(notes) or None


def _count(failed: FailedRows) -> int:
    return sum(map(len, failed.values()))


def warn_of_foreign_objects(output: RunOutput, manifest: Manifest, console: Console) -> None:
    """Names what readers of the output would take for rows of the run, or fail on."""
    foreign = output.foreign_objects({unit.unit_id for unit in manifest.units})
    if foreign:
        console.print(
            f"{len(foreign)} objects in the output are none of this run, and its readers mix them "
            f"with the rows or fail on them: end what writes them and remove {foreign[0]} and the "
            "others",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def fleet_settings(
    config: RunConfig, revision: str, environment: Mapping[str, str]
) -> FleetSettings:
    """The replicas of a run whose model is pinned to `revision`."""
    engine = EngineSettings(
        model=config.model, revision=revision, slots=config.slots, dtype=config.dtype
    )
    if config.engine is not None:
        engine = replace(engine, engine=config.engine)
    return FleetSettings(engine=engine, replicas=config.replicas, environment=environment)


def _pin_model(config: RunConfig, revision: str | None = None) -> _PinnedModel:
    """The model's exact content: of a known revision, or the present one. Raises UsageError for it,
    and for whatever can be known of the spec without loading weights."""
    try:
        selector_for(config.spec)  # a misspelt method must not cost the download of a model
        identity = resolve_model(config.model, revision)
        check_spec(config.spec, capabilities(load_config(identity)))
        backend = image_backend(load_processor(identity))
    except SpprunerError as error:
        raise UsageError(str(error)) from error
    return _PinnedModel(revision=identity.revision, image_backend=backend)


def _label(
    config: RunConfig,
    manifest: Manifest,
    todo: list[Unit],
    output: RunOutput,
    fleet: Fleet,
    console: Console,
    began: float,
    failed: FailedRows,
) -> Attempt:
    """Labels and commits `todo`, or only its failed rows."""
    _set_up_ray_data()
    rows = _count(failed) or sum(unit.row_count for unit in todo)
    if failed:
        # A few rows of each unit say nothing about whole batches, and it is known that they fail.
        config = replace(config, control_share=0.0, max_error_share=1.0)
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
    actors = actors_for(fleet.target_replicas)
    settings = LabellerSettings(
        run_id=manifest.run_id,
        first_unit=manifest.units[0].unit_id,
        config=config,
        model_revision=manifest.identity.settings["model_revision"],
        app=fleet.app,
        deployment=fleet.deployment,
        slots=fleet.slots,
        # Those that are still to come are counted: actors follow how many there are.
        replicas=fleet.target_replicas,
        kv_token_capacity=(
            None
            if fleet.kv_token_capacity is None
            else fleet.kv_token_capacity * fleet.target_replicas // fleet.replicas
        ),
        unit_rows=rows // len(todo),
        unit_bytes=sum(
            unit.size_bytes * len(failed.get(unit.unit_id, range(unit.row_count))) // unit.row_count
            for unit in todo
        )
        // len(todo),
    )
    _warn_if_starved(console, actors)
    sink: CommitSink | RetrySink = (
        RetrySink(manifest, output, on_commit=report_commit)
        if failed
        else CommitSink(manifest, output, on_commit=report_commit, stop_reason=stop_reason_now)
    )
    with RunTracker(config, manifest, output, again=failed) as tracker:
        before = _stats(fleet)
        started = time.monotonic()
        with ProgressDisplay(tracker.progress, console):
            left: Sequence[Unit] = todo
            while left:
                units = read_units(
                    manifest.source,
                    manifest.mapping,
                    left,
                    replicas=fleet.target_replicas,
                    on_event=partial(report_event, manifest.run_id),
                )
                if failed:
                    units = units.map_batches(
                        partial(select_rows, failed=failed),
                        batch_size=None,
                        batch_format="pyarrow",
                        num_cpus=READER_CPUS,  # the reader's: Ray Data runs both in one task
                    )
                labelled = label_units(units, settings, actors=actors)
                _write(labelled, sink, tracker)
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
    rows -= sum(unit.row_count for unit in left)
    after = _stats(fleet)
    return Attempt(
        rows=rows,
        wall_seconds=wall,
        start_seconds=started - began,
        rows_per_second=rows / wall,
        replicas=fleet.replicas if after is None else len(after.replicas),
        replica_busy_share=_busy_share(before, after),
        events=tracker.events,
    )


def _write(labelled: Dataset, sink: CommitSink | RetrySink, tracker: RunTracker) -> None:
    """Carries out the pipeline. Raises the RunError that ended it, where there is one."""
    try:
        labelled.write_datasink(sink, ray_remote_args={"num_cpus": _SINK_CPUS})
    except Exception as error:
        # Ray wraps what its workers raise, and loses the cause where it pickles it twice.
        cause = run_error(error) or tracker.stop_error()
        if cause is None:
            raise
        raise cause from error


def _stats(fleet: Fleet) -> FleetStats | None:
    """None where no replica answers: a figure about the run must not fail it."""
    try:
        return fleet.stats()
    except Exception as error:  # of Ray, of Serve or of a replica that has just died
        logger.warning("stats_unavailable", app=fleet.app, error=type(error).__name__)
        return None


def _busy_share(before: FleetStats | None, after: FleetStats | None) -> float | None:
    """Mean over the seconds of all replicas, those that joined included; None if a replica did not
    answer or was replaced: its counters started from zero."""
    if before is None or after is None:
        return None
    if not {replica.pid for replica in before.replicas} <= {r.pid for r in after.replicas}:
        return None
    seconds = after.uptime_seconds - before.uptime_seconds
    return (after.busy_seconds - before.busy_seconds) / seconds if seconds > 0 else None


def _warn_if_starved(console: Console, actors: int) -> None:
    """Ray waits silently where reading, labelling and writing do not fit beside what runs."""
    free = ray.available_resources().get("CPU", 0.0)
    needed = READER_CPUS + actors * LABELLER_CPUS + _SINK_CPUS
    if free < needed:
        console.print(
            f"only {free:.2f} CPUs of the cluster are free and this run needs {needed:.2f} beside "
            "its replicas: it waits until other work ends or a node joins",
            style="yellow",
        )


def _set_up_ray_data() -> None:
    """Ray Data's own bars and logs count blocks and operators; ours count rows. What a stage raises
    arrives here as it is: wrapped, it would lose the error that says what to do. It is told once,
    by the command, and not logged with Ray's stack before."""
    context = DataContext.get_current()
    context.raise_original_map_exception = True
    logging.getLogger(_RAY_DATA_STATE).setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
