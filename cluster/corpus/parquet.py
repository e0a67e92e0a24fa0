"""The Parquet reader's plan: units of each file, columns of all files. Columns are as Hugging Face
datasets store them.

Guarantees: indexing reads only the footer; an indexed unit lies within one row group; files whose
columns differ are one corpus where no value is lost by that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import Kind
from cluster.corpus.columns import ColumnChoice, ColumnMapping, map_table_columns
from cluster.corpus.git_lfs import POINTER_BYTES, check_not_pointer
from cluster.corpus.image_values import image_values
from cluster.corpus.parquet_file import open_parquet
from cluster.corpus.partitions import partition_array, partition_schema, partition_values
from cluster.corpus.types import unify_schemas
from cluster.corpus.unit import FileIndex, Unit, make_unit
from cluster.errors import StoreError, UsageError
from cluster.images import image_format
from cluster.store import ObjectInfo, RangedFile, Store

# Values that are looked at to find out whether a column holds images.
_PROBED_ROWS = 8
_PROBED_BYTES = 2**20
# Each 256 rows become a unit, which the planner holds: a footer may claim anything.
_MOST_GROUP_ROWS = 2**27


def index_parquet(store: Store, info: ObjectInfo, *, unit_rows: int, unit_bytes: int) -> FileIndex:
    """Indexes one file from its footer: its columns, and its units of up to `unit_rows` rows and
    about `unit_bytes` bytes. Raises UsageError if it is not a Parquet file."""
    uri = store.uri_of(info.key)
    source = RangedFile(store, info)
    try:
        file = open_parquet(source)
        schema = file.schema_arrow
    except (StoreError, MemoryError):
        raise
    except Exception as error:  # on a hostile footer pyarrow raises anything: of names, of Thrift
        check_not_pointer(source.read_range(0, min(POINTER_BYTES, info.size)), uri)
        reason = " ".join(str(error).split())
        raise UsageError(f"{uri}: not a Parquet file ({reason}); remove or repair it") from error
    twice = sorted(name for name, times in Counter(schema.names).items() if times > 1)
    if twice:
        raise UsageError(f"{uri}: several columns are called {', '.join(twice)}; rename them")
    units: list[Unit] = []
    group_start = 0
    for group in range(file.metadata.num_row_groups):
        metadata = file.metadata.row_group(group)
        rows = metadata.num_rows
        if not 0 <= rows <= _MOST_GROUP_ROWS:
            raise UsageError(
                f"{uri}: row group {group} says it has {rows:,} rows, more than can be read "
                f"({_MOST_GROUP_ROWS:,}); remove, repair or rewrite it"
            )
        row_bytes = max(1.0, _group_bytes(metadata) / max(1, rows))
        step = max(1, min(unit_rows, int(unit_bytes / row_bytes)))
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
    return FileIndex(info=info, units=tuple(units), schema=schema)


def _group_bytes(group: pq.RowGroupMetaData) -> int:
    """Bytes of the row group's columns. Old DuckDB and parquet-go leave the group's own figure 0,
    and a group of nothing would be one unit, whatever its images weigh."""
    chunks = map(group.column, range(group.num_columns))
    return group.total_byte_size or sum(
        max(chunk.total_uncompressed_size, chunk.total_compressed_size) for chunk in chunks
    )


def map_parquet_columns(
    store: Store,
    files: Sequence[FileIndex],
    *,
    kind: Kind,
    prompt: str,
    choice: ColumnChoice | None = None,
) -> ColumnMapping:
    """Maps the columns of all files, and those in the names of their folders. Raises UsageError if
    files cannot be one corpus, naming two and the column, or if a required column is missing."""
    schema = unify_schemas(
        [file.schema for file in files], [store.uri_of(file.info.key) for file in files]
    )
    folders = _folder_columns(store, files, schema)

    def looks_like_images(name: str) -> bool:
        with_column = (file for file in files if name in file.schema.names and file.units)
        file = next(with_column, None)
        return file is not None and _begins_with_images(store, file.info, name)

    mapping = map_table_columns(
        schema,
        kind=kind,
        prompt=prompt,
        uri=store.uri,
        folders=folders,
        choice=choice,
        looks_like_images=looks_like_images,
    )
    for file in files:
        missing = {mapping.image, mapping.question} - {None, *file.schema.names}
        if missing:
            raise UsageError(
                f"{store.uri_of(file.info.key)} has no column {', '.join(map(str, missing))}, "
                f"which other files have, only {file.schema.names}; run it as a corpus of its own"
            )
    return mapping


def _folder_columns(store: Store, files: Sequence[FileIndex], schema: pa.Schema) -> pa.Schema:
    """The columns that files have in the names of their folders and not in themselves. Raises
    UsageError where such a value is none of the column that other files have in themselves."""
    folders: dict[str, pa.DataType] = {}
    for field in partition_schema(file.info.key for file in files):
        name = field.name
        if name not in schema.names:
            folders[name] = field.type
            continue
        kind = schema.field(name).type
        for file in files:
            if name in file.schema.names or name not in partition_values(file.info.key):
                continue
            folders[name] = kind
            try:
                partition_array(file.info.key, name, kind, 1)
            except pa.ArrowException as error:
                raise UsageError(
                    f"{store.uri_of(file.info.key)}: {name!r} in the folder's name is no {kind}, "
                    "as it is in other files; run it as a corpus of its own"
                ) from error
    return pa.schema(list(folders.items()))


def _begins_with_images(store: Store, info: ObjectInfo, name: str) -> bool:
    """Whether the first values of the column that are not null begin as images do."""
    try:
        with open_parquet(RangedFile(store, info), buffer_size=_PROBED_BYTES) as file:
            batches = file.iter_batches(_PROBED_ROWS, columns=[name])
            batch = next(iter(batches), None)
    except (StoreError, MemoryError):
        raise
    except Exception:  # parsers raise anything on hostile bytes
        return False
    if batch is None:
        return False
    images = [value for value in image_values(batch.column(0)) if isinstance(value, bytes)]
    return bool(images) and all(map(image_format, images))
