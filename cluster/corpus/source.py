"""The corpus as a Ray Data source.

Guarantees: one unit is one read task and one block, and stays one block in the stages after it;
a unit that cannot be read yields an error row for each planned row; a store that gave up fails the
read, because its rows may be readable in a later attempt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
import ray.data
import structlog
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from cluster.corpus.columns import ColumnMapping
from cluster.corpus.parquet import read_parquet_unit
from cluster.corpus.table import build_error_table
from cluster.corpus.unit import Unit
from cluster.corpus.webdataset import read_tar_unit
from cluster.errors import ObjectGone, ReadError, StoreError
from cluster.schema import input_schema
from cluster.store import Store, open_store

logger = structlog.get_logger(__name__)

READER_CPUS = 0.5
"""CPUs of one read task. A reader mostly waits for the store; with a whole CPU each, readers would
never be scheduled on a small machine whose replicas hold all but one CPU."""
# At 10 s for a unit of 256 rows, two readers deliver 50 rows/s.
_READERS_PER_REPLICA = 2


class UnitSource(Datasource):
    """Reads units. Images stay encoded; the schema is `cluster.schema.input_schema`'s."""

    def __init__(self, source: str, mapping: ColumnMapping, units: Sequence[Unit]) -> None:
        """source: URI of the store that `Unit.file` is relative to."""
        super().__init__()
        self._store = open_store(source)
        self._mapping = mapping
        self._units = tuple(units)

    def get_name(self) -> str:
        """The operator's name in Ray Data."""
        return "Units"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all units."""
        return sum(unit.size_bytes for unit in self._units)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task per unit. `parallelism` is ignored, because a unit is never divided."""
        schema = input_schema(self._mapping.schema)
        return [
            ReadTask(
                partial(_read_block, self._store, unit, self._mapping),
                BlockMetadata(unit.row_count, unit.size_bytes, [unit.file], None),
                schema=schema,
            )
            for unit in self._units
        ]


def read_units(
    source: str, mapping: ColumnMapping, units: Sequence[Unit], *, replicas: int = 1
) -> ray.data.Dataset:
    """The dataset of `units`, one block each, in this stage and the stages after it.

    source: URI of the store that `Unit.file` is relative to. replicas: replicas that the dataset
    feeds; at most two units are read concurrently for each.

    Ray divides blocks to raise their number or to bound their size. The sink needs whole units, so
    the number of blocks is fixed and their size is bounded by the plan alone. Without a bound on
    concurrency Ray starts a reader for every free half CPU; each of these processes takes a second
    of a core to start, while the labelling stage starts too.
    """
    dataset = ray.data.read_datasource(
        UnitSource(source, mapping, units),
        override_num_blocks=len(units),
        num_cpus=READER_CPUS,
        concurrency=min(len(units), _READERS_PER_REPLICA * replicas),  # Ray warns above len(units)
    )
    dataset.context.target_max_block_size = None
    return dataset


def read_unit(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    """All planned rows of the unit, in order; rows that cannot be read are error rows.

    Raises StoreError where the store gave up after its retries. Such a unit may be readable in a
    later attempt, and a committed error row is never replaced, so no error rows are made of it.
    MemoryError, which says nothing about the rows, passes too.
    """
    logger.debug("unit_read", unit_id=unit.unit_id, file=unit.file, rows=unit.row_count)
    read = read_parquet_unit if unit.format == "parquet" else read_tar_unit
    try:
        return read(store, unit, mapping)
    except (ObjectGone, ReadError) as error:
        logger.warning("unit_unreadable", unit_id=unit.unit_id, file=unit.file, error=str(error))
        return build_error_table(unit, mapping, str(error))
    except (StoreError, MemoryError):
        raise
    except Exception as error:
        # Parsers raise anything on hostile bytes. One unit of them must not end the run, at every
        # resume again.
        logger.exception("unit_unreadable", unit_id=unit.unit_id, file=unit.file)
        return build_error_table(unit, mapping, f"{type(error).__name__}: {error}"[:300])


def _read_block(store: Store, unit: Unit, mapping: ColumnMapping) -> Iterator[pa.Table]:
    yield read_unit(store, unit, mapping)
