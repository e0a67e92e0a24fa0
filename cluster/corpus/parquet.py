"""The Parquet reader. Columns are as Hugging Face datasets store them.

Guarantees: a unit lies within one row group, so reading it fetches no other group; indexing reads
only the footer; the row's image is not copied into the committed columns; damage in a row group
fails the units of that group alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from cluster.config import Kind
from cluster.corpus.columns import ColumnMapping, describe_difference, map_table_columns
from cluster.corpus.table import SourceRow, build_unit_table
from cluster.corpus.text import clean_array
from cluster.corpus.unit import FileIndex, Unit, make_unit
from cluster.errors import ReadError, UsageError
from cluster.store import ObjectInfo, RangedFile, Store

logger = structlog.get_logger(__name__)

# Read-ahead while a row group larger than the unit is streamed.
_STREAM_BYTES = 8 * 2**20
# Each unit of a row group reads the rows before it too. Above this many units in one group that is
# worth a warning: the file should be rewritten with smaller row groups.
_WIDE_GROUP_UNITS = 8


def index_parquet(store: Store, info: ObjectInfo, *, unit_rows: int, unit_bytes: int) -> FileIndex:
    """Indexes one file from its footer: its columns, and its units of up to `unit_rows` rows and
    about `unit_bytes` bytes. Raises UsageError if it is not a Parquet file."""
    uri = store.uri_of(info.key)
    try:
        file = pq.ParquetFile(RangedFile(store, info))
    except (pa.ArrowException, OSError) as error:  # OSError: a footer that is not Thrift
        raise UsageError(f"{uri}: not a Parquet file ({error}); remove or repair it") from error
    units: list[Unit] = []
    group_start = 0
    for group in range(file.metadata.num_row_groups):
        metadata = file.metadata.row_group(group)
        rows = metadata.num_rows
        row_bytes = max(1.0, metadata.total_byte_size / max(1, rows))
        step = max(1, min(unit_rows, int(unit_bytes / row_bytes)))
        if rows > step * _WIDE_GROUP_UNITS:
            logger.warning("row_group_wide", uri=uri, rows=rows, unit_rows=step)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            position = {
                "row_start": group_start + first,
                "row_count": count,
                "row_group": group,
                "row_group_start": group_start,
                "size_bytes": int(row_bytes * count),
            }
            units.append(make_unit("parquet", info, **position))
        group_start += rows
    return FileIndex(info=info, units=tuple(units), schema=file.schema_arrow)


def map_parquet_columns(
    store: Store, files: Sequence[FileIndex], *, kind: Kind, prompt: str
) -> ColumnMapping:
    """Maps the columns of all files. Raises UsageError if the columns of two files differ, naming
    both, or if a required column is missing."""
    first, *others = files
    for other in others:
        difference = describe_difference(first.schema, other.schema)
        if difference:
            raise UsageError(
                f"{store.uri_of(other.info.key)} differs from {store.uri_of(first.info.key)} in "
                f"its columns: {difference}; run them as separate corpora"
            )
    return map_table_columns(first.schema, kind=kind, prompt=prompt, uri=store.uri)


def read_parquet_unit(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    """Reads the unit's rows. Raises ReadError where the row group cannot be decoded or has other
    rows than planned, ObjectGone where the object was replaced, StoreError where the store gave
    up."""
    try:
        table = _read_rows(store, unit, mapping)
    except (pa.ArrowException, OSError) as error:
        raise ReadError(f"{type(error).__name__}: {error}"[:300]) from error
    if table.num_rows != unit.row_count:
        raise ReadError(f"{table.num_rows} rows where {unit.row_count} were planned")
    table, unreadable = _clean_text(table)
    assert mapping.image is not None
    image = table[mapping.image].combine_chunks()
    pictures = image.field("bytes") if pa.types.is_struct(image.type) else image
    keys = table[mapping.key].cast(pa.string()).to_pylist() if mapping.key else [None] * len(table)
    prompts = (
        table[mapping.question].to_pylist() if mapping.question else [mapping.prompt] * len(table)
    )
    rows = [
        SourceRow(
            # An empty key identifies no row, so it counts as missing.
            key=key or unit.fallback_key(number),
            image=picture.as_py() if valid.as_py() else None,
            prompt=prompt,
            error=unreadable.get(number),
        )
        for number, (key, picture, valid, prompt) in enumerate(
            zip(keys, pictures, image.is_valid(), prompts, strict=True)
        )
    ]
    columns = [
        _drop_image_bytes(image) if source == mapping.image else table[source].combine_chunks()
        for source, _ in mapping.columns
    ]
    return build_unit_table(unit, mapping, rows, columns)


def _read_rows(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    assert unit.row_group is not None
    assert unit.row_group_start is not None
    parts = (mapping.image, mapping.key, mapping.question)
    wanted = {source for source, _ in mapping.columns} | {part for part in parts if part}
    source = RangedFile(store, unit.info)
    file = pq.ParquetFile(source, pre_buffer=True)
    columns = [name for name in file.schema_arrow.names if name in wanted]
    offset = unit.row_start - unit.row_group_start
    if unit.row_count == file.metadata.row_group(unit.row_group).num_rows:
        return file.read_row_group(unit.row_group, columns=columns)
    # The group is larger than the unit: stream it, and hold only the unit's rows in memory.
    streamed = pq.ParquetFile(RangedFile(store, unit.info), buffer_size=_STREAM_BYTES)
    batches = streamed.iter_batches(
        min(unit.row_count, 256), row_groups=[unit.row_group], columns=columns
    )
    schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    return pa.Table.from_batches(
        list(_slice_batches(batches, offset, unit.row_count)), schema=schema
    )


def _clean_text(table: pa.Table) -> tuple[pa.Table, dict[int, ReadError]]:
    """The table with valid text, and by row number why a row's text is not what the file holds."""
    errors: dict[int, ReadError] = {}
    table = table.combine_chunks()
    for position, name in enumerate(table.column_names):
        column, changed = clean_array(table[name].combine_chunks())
        if changed:
            table = table.set_column(position, table.schema.field(name), column)
        reason = f"column {name!r} holds a value that is not valid, such as text that is not UTF-8"
        for number in changed:
            errors.setdefault(number, ReadError(reason))
    return table, errors


def _slice_batches(
    batches: Iterator[pa.RecordBatch], offset: int, count: int
) -> Iterator[pa.RecordBatch]:
    """Rows [offset, offset + count) of consecutive batches. No batch after them is read."""
    for batch in batches:
        if offset < batch.num_rows:
            part = batch.slice(offset, count)
            yield part
            count -= part.num_rows
            if count == 0:
                return
        offset = max(0, offset - batch.num_rows)


def _drop_image_bytes(image: pa.StructArray) -> pa.StructArray:
    """The image column as committed: `bytes` is null, the other fields (the path) are kept."""
    fields = [field.with_nullable(True) for field in image.type]
    arrays = [
        pa.nulls(len(image), field.type) if field.name == "bytes" else image.field(field.name)
        for field in fields
    ]
    return pa.StructArray.from_arrays(arrays, fields=fields, mask=image.is_null())
