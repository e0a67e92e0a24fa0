"""Tables whose log decides which of their Parquet files hold rows: Delta Lake's and Iceberg's.

Such a table keeps files of rows that were deleted or rewritten. Read as plain Parquet these would
be labelled too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cluster.errors import UsageError
from cluster.store import ObjectInfo, Store

LOG_SUFFIXES = (
    "_delta_log/00000000000000000000.json",
    "_delta_log/_last_checkpoint",
    ".metadata.json",
)
"""How the names of files end that tell a log."""
# Name, files of the log behind the table's folder, and the folder of its data. Delta Lake's log
# has its first commit, or a last checkpoint where that was cleaned up. Iceberg's is told by names
# that nobody else gives (`v3`, `00003-<uuid>`).
_LOGS = (
    ("Delta Lake", re.compile(r"((?:.*/)?)_delta_log/.*"), ""),
    (
        "Iceberg",
        re.compile(r"((?:.*/)?)metadata/(?:v\d+|\d+-[0-9a-f-]{36})(?:\.gz)?\.metadata\.json"),
        "data/",
    ),
)


def check_no_table(
    source: Store, listed: Sequence[ObjectInfo], parquet: Sequence[ObjectInfo]
) -> None:
    """Raises UsageError where Parquet files are those of a table with a log.

    listed: all objects that end as those of corpora and logs do. parquet: those to be read.
    """
    for info in listed:
        for kind, log, data in _LOGS:
            found = log.fullmatch(info.key)
            if found and any(file.key.startswith(found[1] + data) for file in parquet):
                table = source.uri_of(found[1]).rstrip("/")
                raise UsageError(
                    f"{table} is a table of {kind}: its log decides which of its Parquet files "
                    "hold rows; export it to plain Parquet first, for instance with Spark: "
                    "spark.read.table(…).write.parquet(…)"
                )
