"""Opening a Parquet file, everywhere in the same way: streamed, and without changing a value."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from cluster.store import RangedFile


def open_parquet(source: RangedFile, **options: Any) -> pq.ParquetFile:
    """The file, read as its pages are asked for. options: pyarrow's; `buffer_size` bounds what a
    column is read ahead, `pre_buffer=True` fetches whole columns instead. Raises what pyarrow and
    the store raise.

    Spark's timestamps (INT96) come in microseconds: in nanoseconds, pyarrow's default, years before
    1677 and after 2262 wrap around.
    """
    return pq.ParquetFile(
        source, **{"pre_buffer": False, "coerce_int96_timestamp_unit": "us", **options}
    )
