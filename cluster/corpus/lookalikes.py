"""Files that look like data of a corpus and are none that is read: of another spelling or format.

A folder may hold a part of its rows in such files. They are not refused, since they may as well be
something else; who plans a run is told of them.
"""

from __future__ import annotations

from itertools import product

from cluster.config import CorpusFormat
from cluster.errors import StoreError
from cluster.store import ObjectInfo, Store

_OTHER_NAMES = {
    "parquet": (".pq", ".parq", ".arrow", ".feather", ".orc", ".avro"),
    "webdataset": (
        ".zip", ".7z", ".rar", ".cpio", ".tbz", ".tbz2", ".txz", ".tlz", ".tzst", ".tfrecord",
        ".tfrecords",
    ),
}  # fmt: skip
# Behind the name of a format: compressed as a whole, not yet there as a whole, or put aside.
_TAILS = (
    ".gz", ".gzip", ".bz2", ".xz", ".lzma", ".lz", ".lz4", ".lzo", ".br", ".zst", ".zstd",
    ".snappy", ".Z", ".part", ".partial", ".incomplete", ".crdownload", ".tmp", ".bak", ".old",
)  # fmt: skip
_SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}


def other_cases(suffix: str) -> tuple[str, ...]:
    """The suffix in every mixture of upper and lower case but the one given."""
    spelled = map("".join, product(*({char.lower(), char.upper()} for char in suffix)))
    return tuple(sorted(set(spelled) - {suffix}))


def find_lookalikes(source: Store, format: CorpusFormat | None) -> list[ObjectInfo]:
    """The objects under the prefix that look like files of the format, or of any, and are none.
    What cannot be listed at once is none: this is for a warning."""
    suffixes = {
        spelling
        for kind, suffix in _SUFFIXES.items()
        if format in (None, kind)
        for name in (*_OTHER_NAMES[kind], *(suffix + tail for tail in _TAILS))
        for spelling in (name, name.lower(), name.upper())
    }
    try:
        return source.with_patience(0.0).list(suffixes=sorted(suffixes))
    except StoreError:
        return []
