"""Parquet corpora: units within one row group each, columns as Hugging Face datasets store them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from cluster.config import Kind
from cluster.corpus.columns import ColumnMapping, difference, table_mapping
from cluster.corpus.table import SourceRow, unit_table
from cluster.corpus.unit import FileIndex, Unit, make_unit
from cluster.errors import ReadError, UsageError
from cluster.store import ObjectInfo, RangedFile, Store

logger = structlog.get_logger(__name__)

# Read ahead while streaming through a row group that is larger than the unit.
_STREAM_BYTES = 8 * 2**20
# Beyond this many units in one row group, each rereading what comes before it, files should be
# rewritten with smaller row groups.
_WIDE_GROUP_UNITS = 8


def index_parquet(store: Store, info: ObjectInfo, *, unit_rows: int, unit_bytes: int) -> FileIndex:
    """Columns and units of one file, from its footer alone. Raises UsageError on other files."""
    uri = store.uri_of(info.key)
    try:
        file = pq.ParquetFile(RangedFile(store, info))
    except pa.ArrowInvalid as error:
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
            where = {
                "row_start": group_start + first,
                "row_count": count,
                "row_group": group,
                "row_group_start": group_start,
                "size_bytes": int(row_bytes * count),
            }
            units.append(make_unit("parquet", info, **where))
        group_start += rows
    return FileIndex(info=info, units=tuple(units), schema=file.schema_arrow)


def parquet_mapping(
    store: Store, files: Sequence[FileIndex], *, kind: Kind, prompt: str
) -> ColumnMapping:
    """The one mapping of all files. Raises UsageError naming two files whose columns differ."""
    first, *others = files
    for other in others:
        differs = difference(first.schema, other.schema)
        if differs:
            raise UsageError(
                f"{store.uri_of(other.info.key)} differs from {store.uri_of(first.info.key)} in "
                f"its columns: {differs}; run them as separate corpora"
            )
    return table_mapping(first.schema, kind=kind, prompt=prompt, uri=store.uri)


def read_parquet_unit(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    """The unit's rows. Raises ReadError where the row group cannot be decoded."""
    try:
        table = _read_rows(store, unit, mapping)
    except (pa.ArrowException, OSError) as error:
        raise ReadError(f"{type(error).__name__}: {error}"[:300]) from error
    if table.num_rows != unit.row_count:
        raise ReadError(f"{table.num_rows} rows where {unit.row_count} were planned")
    assert mapping.image is not None
    image = table[mapping.image].combine_chunks()
    pictures = image.field("bytes") if pa.types.is_struct(image.type) else image
    keys = table[mapping.key].cast(pa.string()).to_pylist() if mapping.key else [None] * len(table)
    prompts = (
        table[mapping.question].to_pylist() if mapping.question else [mapping.prompt] * len(table)
    )
    rows = [
        SourceRow(
            # An empty key is no better than none: nothing could be found by it.
            key=key or unit.fallback_key(number),
            image=picture.as_py() if valid.as_py() else None,
            prompt=prompt,
        )
        for number, (key, picture, valid, prompt) in enumerate(
            zip(keys, pictures, image.is_valid(), prompts, strict=True)
        )
    ]
    columns = [
        _without_bytes(image) if source == mapping.image else table[source].combine_chunks()
        for source, _ in mapping.columns
    ]
    return unit_table(unit, mapping, rows, columns)


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
    # Part of a larger group: stream through it and keep only the unit's rows in memory.
    streamed = pq.ParquetFile(RangedFile(store, unit.info), buffer_size=_STREAM_BYTES)
    batches = streamed.iter_batches(
        min(unit.row_count, 256), row_groups=[unit.row_group], columns=columns
    )
    schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    return pa.Table.from_batches(list(_slice(batches, offset, unit.row_count)), schema=schema)


def _slice(batches: Iterator[pa.RecordBatch], offset: int, count: int) -> Iterator[pa.RecordBatch]:
    """Rows [offset, offset + count) of consecutive batches; reads no further than needed."""
    for batch in batches:
        if offset < batch.num_rows:
            part = batch.slice(offset, count)
            yield part
            count -= part.num_rows
            if count == 0:
                return
        offset = max(0, offset - batch.num_rows)


def _without_bytes(image: pa.StructArray) -> pa.StructArray:
    """The image column as it is committed: which file it was, but no copy of the picture."""
    fields = [field.with_nullable(True) for field in image.type]
    arrays = [
        pa.nulls(len(image), field.type) if field.name == "bytes" else image.field(field.name)
        for field in fields
    ]
    return pa.StructArray.from_arrays(arrays, fields=fields, mask=image.is_null())
