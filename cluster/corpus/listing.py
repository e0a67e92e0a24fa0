"""The objects of a corpus.

Guarantees: all listed objects are of one format and in key order; hidden objects are skipped; input
and output never overlap. Everything else is a UsageError that names what was found instead.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from cluster.errors import UsageError
from cluster.store import ObjectInfo, Store, open_store

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd")


def list_corpus(uri: str, output: str) -> tuple[Store, list[ObjectInfo]]:
    """The store and the objects of the input: all Parquet files or all tars under the prefix, or
    the single file that `uri` names. Raises UsageError where that is not a corpus."""
    source = open_store(uri)
    _check_no_overlap(source.uri, open_store(output).uri)
    listed = [info for info in source.list() if not _is_hidden(info.key)]
    if not listed and source.uri.endswith((".parquet", ".tar", *_COMPRESSED)):
        folder, _, name = source.uri.rpartition("/")
        if not folder.endswith("/"):
            source = open_store(folder)
            listed = [info for info in source.list(name) if info.key == name]
    parquet = [info for info in listed if info.key.endswith(".parquet")]
    tars = [info for info in listed if info.key.endswith(".tar")]
    compressed = [info for info in listed if info.key.endswith(_COMPRESSED)]
    if compressed:
        raise UsageError(
            f"{source.uri_of(compressed[0].key)}: compressed archives cannot be read in parts; "
            "store plain .tar files (their images are compressed already)"
        )
    if parquet and tars:
        raise UsageError(
            f"{uri} mixes Parquet ({parquet[0].key}) and WebDataset ({tars[0].key}); "
            "give one of them as --input"
        )
    if not parquet and not tars:
        suffixes = sorted({PurePosixPath(info.key).suffix or "no suffix" for info in listed})
        found = f"{len(listed)} objects ({', '.join(suffixes[:8])})" if listed else "nothing"
        raise UsageError(f"{uri} holds no *.parquet and no *.tar, but {found}; check --input")
    return source, parquet or tars


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
