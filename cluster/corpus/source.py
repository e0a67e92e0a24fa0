"""The corpus as a Ray Data source: one read task is one unit is one block."""

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
from cluster.corpus.table import unreadable_table
from cluster.corpus.unit import Unit
from cluster.corpus.webdataset import read_tar_unit
from cluster.errors import ObjectGone, ReadError
from cluster.schema import input_schema
from cluster.store import Store, open_store

logger = structlog.get_logger(__name__)

# A reader waits for the store most of the time; a whole CPU each would leave it waiting for ever
# beside replicas that hold all but one on a small machine.
READER_CPUS = 0.5
# Feeds fifty rows a second even where a unit of 256 takes ten seconds to read.
_READERS_PER_REPLICA = 2


class UnitSource(Datasource):
    """Reads units. Images stay compressed; the schema is `cluster.schema.input_schema`'s."""

    def __init__(self, source: str, mapping: ColumnMapping, units: Sequence[Unit]) -> None:
        """source: the URI of the store that the units' files lie in."""
        super().__init__()
        self._store = open_store(source)
        self._mapping = mapping
        self._units = tuple(units)

    def get_name(self) -> str:
        return "Units"

    def estimate_inmemory_data_size(self) -> int:
        return sum(unit.size_bytes for unit in self._units)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task per unit, whatever parallelism is asked for: a unit is never divided."""
        schema = input_schema(self._mapping.schema)
        return [
            ReadTask(
                partial(_blocks, self._store, unit, self._mapping),
                BlockMetadata(unit.row_count, unit.size_bytes, [unit.file], None),
                schema=schema,
            )
            for unit in self._units
        ]


def read_units(
    source: str, mapping: ColumnMapping, units: Sequence[Unit], *, replicas: int = 1
) -> ray.data.Dataset:
    """The dataset of `units`, each one block, here and in the stages after it.

    source: the URI of the store that the units' files lie in. replicas: how many the dataset
    feeds, which bounds how many units are read at once.

    Ray divides blocks to get more of them, or because one is large. A unit must reach the sink
    whole, so the number of blocks is given, and nothing but the plan bounds their size. Ray also
    starts a reader for every half CPU that is free: each process takes a second of a core to
    start, at the moment in which the labelling stage starts too.
    """
    dataset = ray.data.read_datasource(
        UnitSource(source, mapping, units),
        override_num_blocks=len(units),
        num_cpus=READER_CPUS,
        concurrency=min(len(units), _READERS_PER_REPLICA * replicas),  # Ray warns of more
    )
    dataset.context.target_max_block_size = None
    return dataset


def read_unit(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    """The unit's rows, all of them, in order: those that cannot be read as error rows.

    Raises StoreError only where the store gave up after its retries: such a unit may well be
    readable tomorrow, so its rows must not be committed as errors today.
    """
    logger.debug("unit_read", unit_id=unit.unit_id, file=unit.file, rows=unit.row_count)
    read = read_parquet_unit if unit.format == "parquet" else read_tar_unit
    try:
        return read(store, unit, mapping)
    except (ObjectGone, ReadError) as error:
        logger.warning("unit_unreadable", unit_id=unit.unit_id, file=unit.file, error=str(error))
        return unreadable_table(unit, mapping, str(error))


def _blocks(store: Store, unit: Unit, mapping: ColumnMapping) -> Iterator[pa.Table]:
    yield read_unit(store, unit, mapping)
