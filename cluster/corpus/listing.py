"""Which objects make up a corpus, and what to say where they do not."""

from __future__ import annotations

from pathlib import PurePosixPath

from cluster.errors import UsageError
from cluster.store import ObjectInfo, Store, open_store

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd")


def list_corpus(uri: str, output: str) -> tuple[Store, list[ObjectInfo]]:
    """The store and the objects of the input: all Parquet files or tars under it, or the one it
    names. Raises UsageError, naming what is there, where that is not a corpus."""
    source = open_store(uri)
    _check_apart(source.uri, open_store(output).uri)
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


def _check_apart(source: str, output: str) -> None:
    """An output inside its input would change the corpus with every commit, and the reverse
    would let readers of the output see the corpus."""
    first, second = (uri.rstrip("/") + "/" for uri in (source, output))
    if first.startswith(second) or second.startswith(first):
        raise UsageError(f"--input {source} and --output {output} overlap; keep them apart")


def _is_hidden(key: str) -> bool:
    """As pyarrow and Spark have it: a name that starts with `_` or `.` is no data."""
    return any(part.startswith(("_", ".")) for part in key.split("/"))
