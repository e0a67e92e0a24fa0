"""One run, from settings to summary: plan, skip what is committed, label the rest, summarise.

A run has no state besides its output. The same call after any crash resumes where the last commit
ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from cluster.config import RunConfig
from cluster.console import open_console
from cluster.corpus.unit import Unit
from cluster.encoding import check_process
from cluster.errors import SettingsChanged, UsageError
from cluster.output.failed_rows import ErrorChoice, FailedRows, count_rows, find_failed_rows
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.output.summary import Summary, is_current, keep_summary, summarise
from cluster.runs.attempt import attempt_units
from cluster.runs.calibration import calibrate
from cluster.runs.planning import corpus_uri, plan_run
from cluster.runs.shared_storage import check_corpus, check_shared
from cluster.serving.application import FleetSettings
from cluster.serving.client import ServeReplicas
from cluster.serving.engine_settings import VLLM, EngineSettings, check_vllm
from cluster.serving.fleet import open_fleet
from sppruner.adapters import capabilities
from sppruner.engine.format_guide import format_guides
from sppruner.errors import SpprunerError
from sppruner.integrations.vllm.settings import check_spec as check_spec_in_vllm
from sppruner.models.loading import (
    image_backend,
    is_local,
    load_config,
    load_processor,
    resolve_model,
)
from sppruner.pruner import check_spec
from sppruner.selectors import selector_for

EXIT_DONE, EXIT_ERROR_ROWS, EXIT_INCOMPLETE = 0, 3, 5


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
    check_process()
    console = console or open_console(stderr=True)
    output = RunOutput.open(config.output)
    asked = None
    if retry is None:
        output.check_place()  # before a model is downloaded for it
    else:
        asked = output.require_manifest()
    place = None if asked is None else corpus_uri(asked)
    model = _pin_model(config, _planned_revision(config, output, asked))
    manifest = plan_run(
        _as_planned(config, output),
        output,
        model_revision=model.revision,
        image_backend=model.image_backend,
        place=place,
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
        if not is_current(output.summary(), summary):  # a driver died behind its last commit
            keep_summary(output, summary)
        nothing = "finished before: nothing was left to do"
        return Outcome(summary=summary, note=nothing if retry is None else "no row to ask again")
    if failed:
        output.check_replaced_by_version()
    else:
        output.check_first_writer_wins()

    with open_fleet(fleet_settings(config, model.revision, environment or {})) as fleet:
        if fleet.image_backend != model.image_backend:
            raise UsageError(
                f"replicas decode with {fleet.image_backend}, this machine with "
                f"{model.image_backend}: install torchvision on both or on neither"
            )
        check_dtype(config, manifest, output, fleet.dtype)
        check_corpus(manifest)
        check_shared(output, console)
        if config.replicas > fleet.target_replicas:
            console.print(
                f"{fleet.target_replicas} replicas of the model are up already and are used: "
                f"--replicas {config.replicas} starts no more",
                style="yellow",
                highlight=False,
            )
        if config.auto:
            replicas = ServeReplicas(fleet.handle)
            decision = calibrate(config, manifest, todo, output, replicas, slots=fleet.slots)
            config = replace(config, spec=decision.spec(config.spec), auto=False)
        attempt = attempt_units(
            config, manifest, todo, output, fleet, console=console, began=began, failed=failed
        )
    output.check_run()
    summary = summarise(output, attempt)
    keep_summary(output, summary)
    return Outcome(summary=summary, note=_note(manifest, todo, failed, summary))


def _note(
    manifest: Manifest, todo: Sequence[Unit], failed: FailedRows, summary: Summary
) -> str | None:
    if failed:
        asked, rows = summary.attempt.rows if summary.attempt else 0, count_rows(failed)
        note = f"{rows} failed rows of {len(failed)} units were asked again"
        if asked < rows:
            note = (
                f"{asked} of {note}; the others were mended meanwhile, or {manifest.source} did "
                "not give them"
            )
        return note
    resumed = len(manifest.units) - len(todo)
    notes = []
    if resumed:
        notes.append(f"resumed: {resumed} of {len(manifest.units)} units were done before")
    missing = summary.units - summary.units_done
    if missing:
        notes.append(
            f"{missing} units are missing, {manifest.source} did not give them (units_deferred in "
            "the log says why): once it answers, the same command labels them"
        )
    return "; ".join(notes) or None


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
        model=config.model,
        revision=revision,
        slots=config.slots,
        dtype=config.dtype,
        options=config.engine_options,
    )
    if config.engine is not None:
        engine = replace(engine, engine=config.engine)
    return FleetSettings(engine=engine, replicas=config.replicas, environment=environment)


def _as_planned(config: RunConfig, output: RunOutput) -> RunConfig:
    """The settings with which the run was begun: one of dtype `auto` goes on with `--dtype` of what
    that was."""
    if config.dtype == "auto" or output.manifest_head() is None or output.dtype() != config.dtype:
        return config
    return replace(config, dtype="auto")


def check_dtype(config: RunConfig, manifest: Manifest, output: RunOutput, dtype: str) -> None:
    """Raises SettingsChanged where replicas of this dtype would give a run of `auto` other answers
    than it was begun with: on a CPU it is another than on a GPU."""
    if "dtype" in manifest.identity.settings:
        return
    kept = output.dtype()
    if kept is None and output.committed_units():
        return  # begun by an earlier version, which kept none
    kept = kept or output.keep_dtype(dtype)
    if kept != dtype:
        raise SettingsChanged(
            f"{config.output} was begun on replicas in {kept}, and those here run in {dtype}: add "
            f"--dtype {kept} to go on, or choose another --output"
        )


def _planned_revision(config: RunConfig, output: RunOutput, asked: Manifest | None) -> str | None:
    """The revision of a run that was begun before, of a model from the Hub: rows of one run are of
    one model, whatever its name leads to by now. None for the present one, with which planning
    compares a folder's. asked: the run whose failed rows are asked again, of a folder's model too.
    """
    planned = asked
    if asked is None and not is_local(config.model):
        planned = output.manifest()
    if planned is None:
        return None
    settings = planned.identity.settings
    revision: str = settings["model_revision"]
    return revision if asked is not None or settings["model"] == config.model else None


def _pin_model(config: RunConfig, revision: str | None = None) -> _PinnedModel:
    """The model's exact content: of a known revision, or the present one. Raises UsageError for it,
    and for whatever can be known of the spec without loading weights."""
    if config.engine == VLLM:
        check_vllm(config.engine_options)
    try:
        selector_for(config.spec)  # a misspelt method must not cost the download of a model
        identity = resolve_model(config.model, revision)
        model_config = load_config(identity)
        check = check_spec_in_vllm if config.engine == VLLM else check_spec
        check(config.spec, capabilities(model_config))
        processor = load_processor(identity)
        if config.generation.format is not None:
            format_guides(processor.tokenizer, model_config).start(config.generation.format)
    except SpprunerError as error:
        raise UsageError(str(error)) from error
    tokens = config.generation.max_new_tokens
    context = model_config.get_text_config().max_position_embeddings
    if tokens >= context:
        raise UsageError(
            f"--max-new-tokens {tokens}: prompt and answer have {context} tokens in this model; "
            "give fewer"
        )
    return _PinnedModel(revision=identity.revision, image_backend=image_backend(processor))
