"""Columns in folder names, as Hive and Spark write them: `split=train/year=2024/a.parquet`.

Guarantees: a name's value is the same for every row of a file, so it is never a row's key; a column
of the file itself wins over a folder's; all values of a column are integers or all are text.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote

import pyarrow as pa

from cluster.corpus.text import escape_invalid

_NULL = "__HIVE_DEFAULT_PARTITION__"


def partition_values(key: str) -> dict[str, str | None]:
    """Value by column name of an object's folders; None is null. Escapes (`%20`) are undone."""
    values: dict[str, str | None] = {}
    for folder in escape_invalid(key).split("/")[:-1]:
        name, equals, value = folder.partition("=")
        if equals and name:
            values[unquote(name)] = None if value == _NULL else unquote(value)
    return values


def partition_schema(keys: Iterable[str]) -> pa.Schema:
    """The columns of these objects' folders: int64 where all values are integers that text would
    not tell apart from (no `007`), else string."""
    found: dict[str, set[str]] = {}
    for key in keys:
        for name, value in partition_values(key).items():
            found.setdefault(name, set()).update(() if value is None else (value,))
    return pa.schema(
        [
            (name, pa.int64() if values and all(map(_is_integer, values)) else pa.string())
            for name, values in found.items()
        ]
    )


def partition_array(key: str, column: str, kind: pa.DataType, rows: int) -> pa.Array:
    """The column for `rows` rows of an object; null where its folders do not have it."""
    value = partition_values(key).get(column)
    if value is None:
        return pa.nulls(rows, kind)
    return pa.repeat(pa.scalar(value, pa.string()).cast(kind), rows)


def _is_integer(text: str) -> bool:
    try:
        return str(int(text)) == text and -(2**63) <= int(text) < 2**63
    except ValueError:
        return False
