"""Indexing the files of a corpus, and what the plan says about damaged ones.

Guarantees: files are indexed several at a time and no more of them than a limit needs; the index of
a tar of a large corpus is kept in the output as soon as it is made, so a planner that dies loses
nothing and several may share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from cluster.config import RunConfig
from cluster.corpus.index_object import decode_index, encode_index, name_index
from cluster.corpus.parquet import index_parquet
from cluster.corpus.shard_counts import find_shard_counts
from cluster.corpus.tar_index import index_tar
from cluster.corpus.unit import FileIndex
from cluster.output.run_output import RunOutput
from cluster.store import ObjectInfo, Store

logger = structlog.get_logger(__name__)

# Each mostly waits for the store: the next header is known once the one before is read.
_THREADS = 16
# Below both, indexing again is as quick as reading what was kept.
_KEPT_ABOVE_FILES = 8
_KEPT_ABOVE_BYTES = 2**30


def index_files(
    config: RunConfig, source: Store, corpus: Sequence[ObjectInfo], output: RunOutput
) -> list[FileIndex]:
    """The indices of the files, in order, and no more of them than the limit needs. Raises
    UsageError where a file cannot be part of a corpus, StoreError where a store gave up."""
    if corpus[0].key.endswith(".parquet"):
        index = partial(
            index_parquet, source, unit_rows=config.unit_rows, unit_bytes=config.unit_bytes
        )
        return _index_each(index, corpus, config.limit)
    large = len(corpus) > _KEPT_ABOVE_FILES or sum(info.size for info in corpus) > _KEPT_ABOVE_BYTES
    index_one = partial(_index_tar, config, source, output if large else None)
    files = _index_each(index_one, corpus, config.limit)
    _warn_of_damage(config, source, files)
    return files


def _index_each(
    index: Callable[[ObjectInfo], FileIndex], corpus: Sequence[ObjectInfo], limit: int | None
) -> list[FileIndex]:
    files: list[FileIndex] = []
    step = len(corpus) if limit is None else _THREADS
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(corpus), step):
            files += pool.map(index, corpus[first : first + step])
            if limit is not None and sum(file.rows for file in files) >= limit:
                break
    return files


def _index_tar(
    config: RunConfig, source: Store, output: RunOutput | None, info: ObjectInfo
) -> FileIndex:
    """The kept index of the tar, or a new one, which is kept. output: None: nothing is kept."""

    def index() -> FileIndex:
        return index_tar(
            source,
            info,
            unit_rows=config.unit_rows,
            unit_bytes=config.unit_bytes,
            dotted_keys=config.dotted_keys,
        )

    if output is None:
        return index()
    name = name_index(
        source.uri,
        info,
        unit_rows=config.unit_rows,
        unit_bytes=config.unit_bytes,
        dotted_keys=config.dotted_keys,
    )
    kept = output.file_index(name)
    found = None if kept is None else decode_index(kept, info)
    if found is None:
        found = index()
        output.keep_file_index(name, encode_index(found))
    return found


def _warn_of_damage(config: RunConfig, source: Store, files: Sequence[FileIndex]) -> None:
    # The folder of a single tar is no input and may hold anything, /tmp or a bucket of millions.
    alone = config.input.endswith(".tar") and len(files) == 1
    prefix = files[0].info.key.removesuffix(".tar") if alone else ""
    expected = find_shard_counts(source, [file.info for file in files], prefix=prefix)
    for file in files:
        uri = source.uri_of(file.info.key)
        damaged = sum(len(unit.damaged) for unit in file.units)
        rows = file.rows - damaged
        if damaged:
            logger.warning(
                "archive_damaged",
                uri=uri,
                unread_bytes=file.unread_bytes,
                size=file.info.size,
                rows=rows,
                error_rows=damaged,
            )
        counted = expected.get(file.info.key, rows)
        if counted != rows:
            logger.warning("archive_rows_differ", uri=uri, rows=rows, rows_expected=counted)
        for warning in file.warnings:
            logger.warning("archive_suspect", uri=uri, reason=warning)
