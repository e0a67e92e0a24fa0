"""The objects of a corpus.

Guarantees: all listed objects are of one format and in key order; hidden objects are skipped, and
what looks like data of another spelling or format is told of; input and output never overlap.
Everything else is a UsageError that names what was found instead.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

import structlog

from cluster.config import CorpusFormat
from cluster.corpus.lookalikes import find_lookalikes, other_cases
from cluster.corpus.shard_counts import STATS_SUFFIX
from cluster.corpus.table_logs import LOG_SUFFIXES, check_no_table
from cluster.errors import UsageError
from cluster.store import FIRST_CONTACT_S, ObjectInfo, Store, open_store

logger = structlog.get_logger(__name__)

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd")
# Neither read nor passed over: to most systems they are other names than those above.
_OTHER_PARQUET, _OTHER_TAR = other_cases(".parquet"), other_cases(".tar")
_OTHER_CASE = _OTHER_PARQUET + _OTHER_TAR
_OF_CORPORA = (".parquet", ".tar", *_COMPRESSED, STATS_SUFFIX)


def list_corpus(
    uri: str, output: str, format: CorpusFormat | None = None, *, begun: bool = False
) -> tuple[Store, list[ObjectInfo]]:
    """The store and the objects of the input: all Parquet files or all tars under the prefix, or
    the single file that `uri` names. Raises UsageError where that is not a corpus.

    format: the files that count where there are both. Without it, the Parquet files that
    img2dataset writes beside its tars do not count. begun: whether there is a run over it, which
    then has its files.
    """
    source = opened = open_store(uri)
    _check_no_overlap(source.uri, open_store(output).uri)
    first = source.with_patience(FIRST_CONTACT_S)
    refused = () if begun else _OTHER_CASE
    found = first.list(suffixes=(*_OF_CORPORA, *LOG_SUFFIXES, *refused))
    listed = [info for info in found if info.key.endswith(_OF_CORPORA) and not _is_hidden(info.key)]
    if not listed and source.uri.endswith((".parquet", ".tar", *_COMPRESSED)):
        folder, _, name = source.uri.rpartition("/")
        if not folder.endswith("/"):
            source = open_store(folder)
            listed = [info for info in source.list(name) if info.key == name]
    parquet = [info for info in listed if info.key.endswith(".parquet")]
    tars = [info for info in listed if info.key.endswith(".tar")]
    compressed = [info for info in listed if info.key.endswith(_COMPRESSED)]
    if format is None:
        parquet = _drop_img2dataset_tables(source, parquet, tars, listed)
    elif format == "parquet":
        tars, compressed = [], []
    else:
        parquet = []
    check_no_table(source, found, parquet)
    counted = {None: _OTHER_CASE, "parquet": _OTHER_PARQUET, "webdataset": _OTHER_TAR}
    odd = [i for i in found if i.key.endswith(counted[format]) and not _is_hidden(i.key)]
    if odd:
        raise UsageError(
            f"{source.uri_of(odd[0].key)}: files are known by .parquet and .tar in lower case; "
            f"rename it{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}"
        )
    if compressed:
        raise UsageError(
            f"{source.uri_of(compressed[0].key)}: compressed archives cannot be read in parts; "
            "store plain .tar files (their images are compressed already)"
        )
    if parquet and tars:
        raise UsageError(
            f"{uri} mixes Parquet ({parquet[0].key}) and WebDataset ({tars[0].key}); "
            "give one of them as --input, or say which: --format parquet or --format webdataset"
        )
    if not parquet and not tars:
        others = [info for info in first.list() if not _is_hidden(info.key)]
        suffixes = sorted({PurePosixPath(info.key).suffix or "no suffix" for info in others})
        there = f"{len(others)} objects ({', '.join(suffixes[:8])})" if others else "nothing"
        wanted = {None: "*.parquet and no *.tar", "parquet": "*.parquet", "webdataset": "*.tar"}
        raise UsageError(f"{uri} holds no {wanted[format]}, but {there}; check --input")
    if source is opened and not begun:
        _warn_of_lookalikes(source, format)
    return source, parquet or tars


def _warn_of_lookalikes(source: Store, format: CorpusFormat | None) -> None:
    unread = [info for info in find_lookalikes(source, format) if not _is_hidden(info.key)]
    if unread:
        logger.warning(
            "files_of_other_names_not_read",
            uri=source.uri,
            files=len(unread),
            first=unread[0].key,
            read="*.parquet and *.tar alone",
        )


def _drop_img2dataset_tables(
    source: Store, parquet: list[ObjectInfo], tars: list[ObjectInfo], listed: list[ObjectInfo]
) -> list[ObjectInfo]:
    """The Parquet files less those that describe tars: they have the name of one, or the figures
    of a shard beside them."""
    if not tars:
        return parquet
    names = {info.key for info in listed}
    kept = [
        info
        for info in parquet
        if not names & {f"{_stem(info)}.tar", f"{_stem(info)}{STATS_SUFFIX}"}
    ]
    if len(kept) < len(parquet):
        logger.warning(
            "parquet_beside_tars_ignored",
            uri=source.uri,
            files=len(parquet) - len(kept),
            instead="--format parquet",
        )
    return kept


def _stem(info: ObjectInfo) -> str:
    return info.key.removesuffix(".parquet")


def _check_no_overlap(source: str, output: str) -> None:
    """Raises UsageError if one prefix contains the other: commits to an output inside the input
    would change the corpus, and readers of an output that contains the input would read both."""
    first, second = (_resolve(uri).rstrip("/") + "/" for uri in (source, output))
    if first.startswith(second) or second.startswith(first):
        raise UsageError(f"--input {source} and --output {output} overlap; keep them apart")


def _resolve(uri: str) -> str:
    """A path without links and `..`; any other URI as it is."""
    return uri if "://" in uri else os.path.realpath(uri)


def _is_hidden(key: str) -> bool:
    """Whether Spark skips the key too: a part of it starts with `.`, or with `_` unless it is the
    folder of a partition, such as `_split=train`."""
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part)
        for part in key.split("/")
    )
