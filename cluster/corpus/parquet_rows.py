"""The Parquet reader's rows: units of one row group in one pass over it.

Guarantees: as many rows as planned, whatever the bytes; the row group is decoded once for all its
units and held in memory a unit at a time; damage costs the rows of the group behind it; a row's
image is not copied into the committed columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from cluster.corpus.columns import ColumnMapping
from cluster.corpus.image_values import image_values
from cluster.corpus.parquet_file import open_parquet
from cluster.corpus.partitions import partition_array
from cluster.corpus.table import SourceRow, build_error_table, build_unit_table
from cluster.corpus.text import clean_array
from cluster.corpus.types import conform, is_string
from cluster.corpus.unit import Unit
from cluster.errors import ReadError, RowError, StoreError
from cluster.store import ObjectInfo, RangedFile, Store

logger = structlog.get_logger(__name__)

# Read-ahead while a row group larger than the unit is streamed.
_STREAM_BYTES = 8 * 2**20
# Fewest bytes of one request: small row groups that lie side by side share requests.
_WINDOW_BYTES = 2**18


class Footers:
    """Footers of the files that one task reads, each fetched once: of a file with many row groups
    it is megabytes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[str, tuple[RangedFile, pq.FileMetaData]] = {}

    def file(self, info: ObjectInfo, **options: Any) -> pq.ParquetFile:
        """The file, with pyarrow's options for `ParquetFile`. Raises what pyarrow and the store
        raise."""
        if info.key not in self._open:
            source = RangedFile(self._store, info, window=_WINDOW_BYTES)
            self._open = {info.key: (source, open_parquet(source).metadata)}  # one at a time
        source, metadata = self._open[info.key]
        return open_parquet(source, metadata=metadata, page_checksum_verification=True, **options)

    def forget(self, info: ObjectInfo) -> None:
        """Opens the file anew when it is asked for again: after an error, threads of pyarrow's may
        still read from it."""
        self._open.pop(info.key, None)


def read_parquet_units(
    footers: Footers, units: Sequence[Unit], mapping: ColumnMapping
) -> Iterator[pa.Table]:
    """The rows of each unit, in order. All are of one row group, in row order, each in one piece.

    Rows that cannot be read are error rows. Raises ObjectGone where the object was replaced,
    StoreError where the store gave up, MemoryError.
    """
    group = _RowGroup(footers, units, mapping)
    for unit in units:
        table, reason = group.read(unit.row_start - _group_start(unit), unit.row_count)
        if reason:
            logger.warning("rows_unreadable", unit_id=unit.unit_id, file=unit.file, error=reason)
        yield _unit_table(unit, mapping, table, reason)


class _RowGroup:
    """One pass over the rows of a row group. Damage ends it: no page behind it can be found."""

    def __init__(self, footers: Footers, units: Sequence[Unit], mapping: ColumnMapping) -> None:
        self._footers = footers
        self._info = units[0].info
        assert units[0].row_group is not None
        self._group = units[0].row_group
        self._whole = len(units) == 1
        # Units of large images have few rows: a batch must not hold more of them than a unit does.
        self._batch_rows = max(unit.row_count for unit in units)
        parts = (mapping.image, mapping.key, mapping.question)
        self._wanted = {source for source, _ in mapping.columns} | {part for part in parts if part}
        self._image = mapping.image
        self._position = 0
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._rest: pa.RecordBatch | None = None  # of a batch that reaches into the next unit
        self._reason = ""

    def read(self, first: int, count: int) -> tuple[pa.Table | None, str]:
        """Rows [first, first + count) of the group as far as they can be read, None for none; and
        why the others cannot be, or nothing."""
        if self._reason:
            return None, self._reason
        try:
            if self._batches is None:
                self._batches = self._open(self._batch_rows, None if first else count)
            return self._take(first, count)
        except (StoreError, MemoryError):
            raise
        except Exception as error:  # parsers raise anything on hostile bytes
            self._reason = f"{type(error).__name__}: {error}"[:300]
        try:
            # Up to the damaged page row by row: a batch would lose what comes before it.
            self._footers.forget(self._info)
            self._position, self._rest, self._batches = 0, None, self._open(1, None)
            table, missing = self._take(first, count, keep_what_comes=True)
        except (StoreError, MemoryError):
            raise
        except Exception:  # not even a first row: the reason is that of the first attempt
            return None, self._reason
        if not missing:
            # It was the batch and no row of it, such as one of more than 2 GB: so it goes on.
            self._reason = ""
        return table, self._reason

    def _open(self, batch_rows: int, until: int | None) -> Iterator[pa.RecordBatch]:
        """The group's rows. until: how many are needed, where those are the first ones."""
        file = self._footers.file(self._info)
        columns = [name for name in file.schema_arrow.names if name in self._wanted]
        options = {"read_dictionary": _repeating_leaves(file, self._group, self._image)}
        if self._whole and until == file.metadata.row_group(self._group).num_rows:
            file = self._footers.file(self._info, pre_buffer=True, **options)
            return iter(file.read_row_group(self._group, columns=columns).to_batches())
        # The group is larger than the unit: stream it, and hold only the unit's rows in memory.
        file = self._footers.file(self._info, buffer_size=_STREAM_BYTES, **options)
        return iter(file.iter_batches(batch_rows, row_groups=[self._group], columns=columns))

    def _take(
        self, first: int, count: int, *, keep_what_comes: bool = False
    ) -> tuple[pa.Table | None, str]:
        assert self._batches is not None
        taken: list[pa.RecordBatch] = []
        skip, missing = first - self._position, count
        try:
            while missing:
                batch = self._rest or next(self._batches, None)
                self._rest = None
                if batch is None:
                    break
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    self._position += batch.num_rows
                    continue
                part = batch.slice(skip, missing)
                taken.append(part)
                self._position += skip + part.num_rows
                if skip + part.num_rows < batch.num_rows:
                    self._rest = batch.slice(skip + part.num_rows)
                skip, missing = 0, missing - part.num_rows
        except (StoreError, MemoryError):
            raise
        except Exception:
            if not keep_what_comes:
                raise
        reason = f"{count - missing} rows where {count} were planned" if missing else ""
        return (pa.Table.from_batches(taken) if taken else None), reason


def _group_start(unit: Unit) -> int:
    assert unit.row_group_start is not None
    return unit.row_group_start


def _repeating_leaves(file: pq.ParquetFile, group: int, image: str | None) -> list[str]:
    """The leaf columns of the image column whose values are mostly dictionary entries: they are
    read as such, since a megabyte in the file may be the image of a thousand rows."""
    metadata = file.metadata.row_group(group)
    leaves = []
    for number in range(metadata.num_columns):
        chunk = metadata.column(number)
        name = chunk.path_in_schema.split(".")[0]
        if name != image or not chunk.has_dictionary_page or chunk.physical_type != "BYTE_ARRAY":
            continue
        entries = chunk.data_page_offset - (chunk.dictionary_page_offset or 0)
        if entries > chunk.total_compressed_size - entries:
            leaves.append(chunk.path_in_schema)
    return leaves


def _unit_table(
    unit: Unit, mapping: ColumnMapping, table: pa.Table | None, reason: str
) -> pa.Table:
    """The unit's planned rows: those of `table`, then error rows for the rest."""
    if table is None:
        return build_error_table(unit, mapping, reason)
    try:
        parts = [_convert(unit, mapping, table, 0)]
    except (StoreError, MemoryError):
        raise
    except Exception:  # of one row, or of several: find out which
        parts = [_convert_row(unit, mapping, table, row) for row in range(len(table))]
    rows = list(chain.from_iterable(part[0] for part in parts))
    by_column = zip(*(part[1] for part in parts), strict=True)
    columns = [pa.concat_arrays(arrays) for arrays in by_column]
    missing = unit.row_count - len(rows)
    if missing:
        error = ReadError(f"{unit.file}: {reason}")
        rows += [
            SourceRow(key=unit.fallback_key(row), error=error)
            for row in range(len(rows), unit.row_count)
        ]
        columns = [pa.concat_arrays([column, pa.nulls(missing, column.type)]) for column in columns]
    return build_unit_table(unit, mapping, rows, columns)


def _convert_row(
    unit: Unit, mapping: ColumnMapping, table: pa.Table, number: int
) -> tuple[list[SourceRow], list[pa.Array]]:
    try:
        return _convert(unit, mapping, table.take([number]), number)
    except (StoreError, MemoryError):
        raise
    except Exception as error:
        reason = ReadError(f"{unit.file}: {type(error).__name__}: {error}"[:300])
        row = SourceRow(key=unit.fallback_key(number), error=reason)
        return [row], [pa.nulls(1, field.type) for field in mapping.schema]


def _convert(
    unit: Unit, mapping: ColumnMapping, table: pa.Table, first: int
) -> tuple[list[SourceRow], list[pa.Array]]:
    """Rows and committed columns of a table that starts at the unit's row `first`."""
    arrays = {name: table[name].combine_chunks() for name in table.column_names}
    assert mapping.image is not None
    images = image_values(arrays[mapping.image])
    bad: dict[int, ReadError] = {}
    committed: list[pa.Array] = []
    for (source, _), field in zip(mapping.columns, mapping.schema, strict=True):
        if source not in arrays:
            column = partition_array(unit.file, source, field.type, len(table))
        elif source == mapping.image:
            column = _clean(source, conform(_drop_image_bytes(arrays[source]), field.type), bad)
        else:
            column = _clean(source, conform(arrays[source], field.type), bad)
        committed.append(column)
    keys = _texts(mapping.key, arrays, bad)
    prompts = (
        _texts(mapping.question, arrays, bad) if mapping.question else [mapping.prompt] * len(table)
    )
    rows = []
    for number, (key, image, prompt) in enumerate(zip(keys, images, prompts, strict=True)):
        error = bad.get(number) or (image if isinstance(image, RowError) else None)
        rows.append(
            SourceRow(
                # An empty key identifies no row, so it counts as missing.
                key=key or unit.fallback_key(first + number),
                image=None if isinstance(image, RowError) else image,
                prompt=prompt,
                error=error,
            )
        )
    return rows, committed


def _texts(
    name: str | None, arrays: dict[str, pa.Array], bad: dict[int, ReadError]
) -> list[str | None]:
    if name is None or name not in arrays:
        return [None] * len(next(iter(arrays.values())))
    array = arrays[name]
    if not is_string(array.type):
        array = array.cast(pa.string())
    texts: list[str | None] = _clean(name, conform(array, pa.large_string()), bad).to_pylist()
    return texts


def _clean(name: str, array: pa.Array, bad: dict[int, ReadError]) -> pa.Array:
    """The column with valid text; `bad` gets each row whose text is not what the file holds."""
    array, changed = clean_array(array)
    reason = f"column {name!r} holds a value that is not valid, such as text that is not UTF-8"
    for number in changed:
        bad.setdefault(number, ReadError(reason))
    return array


def _drop_image_bytes(image: pa.Array) -> pa.Array:
    """The image column as committed: `bytes` is null, the other fields (the path) are kept."""
    if pa.types.is_null(image.type):  # of a file in which no row has an image
        return image
    fields = [field.with_nullable(True) for field in image.type]
    arrays = [
        pa.nulls(len(image), field.type) if field.name == "bytes" else image.field(field.name)
        for field in fields
    ]
    return pa.StructArray.from_arrays(arrays, fields=fields, mask=image.is_null())
