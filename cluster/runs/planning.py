"""Planning: from settings to the manifest of a new run, or that of the run to resume."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import structlog

from cluster.config import RunConfig
from cluster.corpus.columns import ColumnChoice, ColumnMapping
from cluster.corpus.listing import list_corpus
from cluster.corpus.parquet import map_parquet_columns
from cluster.corpus.unit import Unit, group_units, take_rows
from cluster.corpus.webdataset import map_tar_columns
from cluster.errors import SettingsChanged, UsageError
from cluster.output.manifest import Identity, Manifest
from cluster.output.run_output import RunOutput
from cluster.runs.indexing import index_files
from cluster.store import ObjectInfo, Store

logger = structlog.get_logger(__name__)


def plan_run(
    config: RunConfig,
    output: RunOutput,
    *,
    model_revision: str,
    image_backend: str,
    place: str | None = None,
) -> Manifest:
    """The manifest of the run that `config` describes: a new one, or the one in its output.

    place: where the corpus lies by now, if `config.input` is not the way to it from here.
    Raises UsageError where the corpus cannot be read as one, SettingsChanged where the output
    belongs to another run, StoreError where a store does not answer.
    """
    begun = output.manifest_head() is not None
    source, corpus = list_corpus(place or config.input, config.output, config.format, begun=begun)
    identity = Identity.of(
        config, corpus, model_revision=model_revision, image_backend=image_backend
    )
    existing = output.manifest()
    if existing is not None:
        return _resume(config, existing, identity)
    stray = output.first_parquet_object()
    if stray is not None:
        raise UsageError(
            f"{stray} is there already, but no run's manifest; "
            "choose an empty --output, or readers would mix its rows with ours"
        )
    mapping, units = _index(config, source, corpus, output)
    if not units:
        raise UsageError(f"{config.input}: {len(corpus)} files without a single row; check --input")
    manifest = Manifest(
        identity=identity,
        source=source.uri,
        mapping=mapping,
        units=tuple(units),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if not output.create_manifest(manifest):
        # Another driver was first: its manifest counts, if it is the same run at all.
        return _resume(config, output.require_manifest(), identity)
    logger.info("run_planned", run_id=manifest.run_id, units=len(manifest.units))
    return manifest


def corpus_uri(manifest: Manifest) -> str:
    """The corpus of a planned run from anywhere: a relative --input is one from the folder in which
    the run was begun."""
    objects = manifest.identity.corpus
    given = str(manifest.identity.settings["input"])
    alone = len(objects) == 1 and given.rpartition("/")[2] == objects[0].key
    return f"{manifest.source}/{objects[0].key}" if alone else manifest.source


def _resume(config: RunConfig, manifest: Manifest, identity: Identity) -> Manifest:
    begun, now = (each.settings["schema_version"] for each in (manifest.identity, identity))
    if begun != now:
        raise SettingsChanged(
            f"{config.output} holds a run of schema version {begun}, whose rows have other columns "
            f"and other seconds than those of this version, {now}: finish it with the version that "
            "began it, or choose another --output"
        )
    if manifest.run_id != identity.run_id:
        changes = "\n  ".join(manifest.identity.changes(to=identity))
        raise SettingsChanged(
            f"{config.output} holds run {manifest.run_id}, which differs from this one:\n"
            f"  {changes}\n"
            "Choose another --output, or undo these changes to resume that run."
        )
    logger.info("run_resumed", run_id=manifest.run_id, units=len(manifest.units))
    return manifest


def _index(
    config: RunConfig, source: Store, corpus: Sequence[ObjectInfo], output: RunOutput
) -> tuple[ColumnMapping, list[Unit]]:
    """The columns of the corpus and its units."""
    files = index_files(config, source, corpus, output)
    choice = ColumnChoice(
        image=config.image_column, key=config.key_column, question=config.question_column
    )
    if corpus[0].key.endswith(".parquet"):
        mapping = map_parquet_columns(
            source, files, kind=config.kind, prompt=config.prompt, choice=choice
        )
    elif choice != ColumnChoice():
        raise UsageError(
            f"{source.uri} holds WebDataset tars: --image-column, --key and --question-column name "
            "columns of Parquet files"
        )
    else:
        mapping = map_tar_columns(
            source,
            files,
            kind=config.kind,
            prompt=config.prompt,
            dotted_keys=config.dotted_keys,
        )
    units: Iterable[Unit] = (unit for file in files for unit in file.units)
    if config.limit is not None:
        units = take_rows(units, config.limit)
    bounds = {"unit_rows": config.unit_rows, "unit_bytes": config.unit_bytes}
    return mapping, list(group_units(units, **bounds))
