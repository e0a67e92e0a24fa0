"""From settings to units: what the run is, whether it is already under way, and what is left."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import pyarrow as pa
import structlog

from cluster.config import Kind, RunConfig
from cluster.corpus.columns import Layout
from cluster.corpus.listing import list_corpus
from cluster.corpus.parquet import index_parquet, parquet_layout
from cluster.corpus.unit import FileIndex, Unit
from cluster.corpus.webdataset import index_tar, tar_layout
from cluster.errors import SettingsChanged, UsageError
from cluster.output.manifest import MANIFEST_KEY, Identity, Manifest, read_manifest
from cluster.store import ObjectInfo, Store, open_store

logger = structlog.get_logger(__name__)

_UNIT_SUFFIX = ".parquet"
_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run: every unit of it, in corpus order, whether done or not.

    input_uri is the store that `Unit.file` is relative to; created is when the run was first
    planned, ISO 8601 in UTC; resumed says that this plan was read from the output.
    """

    run_id: str
    kind: Kind
    input_uri: str
    output_uri: str
    units: tuple[Unit, ...]
    layout: Layout
    created: str
    resumed: bool

    @property
    def source_schema(self) -> pa.Schema:
        """The committed source columns."""
        return self.layout.schema

    @property
    def rows(self) -> int:
        return sum(unit.row_count for unit in self.units)


def plan_run(config: RunConfig, *, model_revision: str, image_backend: str) -> Plan:
    """The plan of the run that `config` describes: a new one, or the one under way in its output.

    Raises UsageError where the corpus cannot be read as one, SettingsChanged where the output
    belongs to another run, StoreError where a store does not answer.
    """
    output = open_store(config.output)
    source, corpus = list_corpus(config.input, config.output)
    identity = Identity.of(
        config, corpus, model_revision=model_revision, image_backend=image_backend
    )
    manifest = read_manifest(output)
    if manifest is not None:
        return _resumed(config, manifest, identity)
    strangers = output.list(suffixes=(_UNIT_SUFFIX,))
    if strangers:
        raise UsageError(
            f"{output.uri_of(strangers[0].key)} is there already, but no run's manifest; "
            "choose an empty --output, or readers would mix its rows with ours"
        )
    layout, units = _index(config, source, corpus)
    if not units:
        raise UsageError(f"{config.input}: {len(corpus)} files without a single row; check --input")
    manifest = Manifest(
        identity=identity,
        source=source.uri,
        layout=layout,
        units=tuple(_limited(units, config.limit)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if not output.put_if_absent(MANIFEST_KEY, manifest.to_json(), writer=uuid.uuid4().hex):
        # Another driver was first: its manifest counts, if it is the same run at all.
        winner = read_manifest(output)
        assert winner is not None
        return _resumed(config, winner, identity)
    logger.info("run_planned", run_id=manifest.run_id, units=len(manifest.units))
    return _plan(config, manifest, resumed=False)


def done_units(store: Store) -> set[str]:
    """Ids of the units committed to an output."""
    keys = (info.key for info in store.list(suffixes=(_UNIT_SUFFIX,)))
    return {key.removesuffix(_UNIT_SUFFIX) for key in keys if "/" not in key}


def unit_key(unit_id: str) -> str:
    """Where a unit is committed, relative to the output."""
    return f"{unit_id}{_UNIT_SUFFIX}"


def _plan(config: RunConfig, manifest: Manifest, *, resumed: bool) -> Plan:
    return Plan(
        run_id=manifest.run_id,
        kind=config.kind,
        input_uri=manifest.source,
        output_uri=open_store(config.output).uri,
        units=manifest.units,
        layout=manifest.layout,
        created=manifest.created,
        resumed=resumed,
    )


def _resumed(config: RunConfig, manifest: Manifest, identity: Identity) -> Plan:
    if manifest.run_id != identity.run_id:
        changes = "\n  ".join(manifest.identity.changes(to=identity))
        raise SettingsChanged(
            f"{config.output} holds run {manifest.run_id}, which differs from this one:\n"
            f"  {changes}\n"
            "Choose another --output, or undo these changes to resume that run."
        )
    logger.info("run_resumed", run_id=manifest.run_id, units=len(manifest.units))
    return _plan(config, manifest, resumed=True)


def _index(
    config: RunConfig, source: Store, corpus: Sequence[ObjectInfo]
) -> tuple[Layout, list[Unit]]:
    """Indexes files in order, several at a time, and no more of them than the limit needs."""
    is_parquet = corpus[0].key.endswith(".parquet")
    index = partial(
        index_parquet if is_parquet else index_tar,
        source,
        unit_rows=config.unit_rows,
        unit_bytes=config.unit_bytes,
    )
    files: list[FileIndex] = []
    step = len(corpus) if config.limit is None else _THREADS
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(corpus), step):
            files += pool.map(index, corpus[first : first + step])
            if config.limit is not None and sum(file.rows for file in files) >= config.limit:
                break
    layout_of = parquet_layout if is_parquet else tar_layout
    layout = layout_of(source, files, kind=config.kind, prompt=config.prompt)
    return layout, [unit for file in files for unit in file.units]


def _limited(units: Sequence[Unit], limit: int | None) -> Iterator[Unit]:
    left = limit
    for unit in units:
        if left is None:
            yield unit
        elif left > 0:
            yield unit.first(left)
            left -= unit.row_count
