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

from cluster.corpus.columns import Layout
from cluster.corpus.parquet import read_parquet_unit
from cluster.corpus.table import unreadable_table
from cluster.corpus.unit import Unit
from cluster.corpus.webdataset import read_tar_unit
from cluster.errors import ObjectGone, ReadError
from cluster.runs.planning import Plan
from cluster.schema import input_schema
from cluster.store import Store, open_store

logger = structlog.get_logger(__name__)

# A reader waits for the store most of the time; a whole CPU each would leave it waiting for ever
# beside replicas that hold all but one on a small machine.
READER_CPUS = 0.5
# Feeds fifty rows a second even where a unit of 256 takes ten seconds to read.
_READERS_PER_REPLICA = 2


class UnitSource(Datasource):
    """Reads `units` of a plan. Images stay compressed; the schema is rows.input_schema's."""

    def __init__(self, plan: Plan, units: Sequence[Unit]) -> None:
        super().__init__()
        self._store = open_store(plan.input_uri)
        self._layout = plan.layout
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
        schema = input_schema(self._layout.schema)
        return [
            ReadTask(
                partial(_blocks, self._store, unit, self._layout),
                BlockMetadata(unit.row_count, unit.size_bytes, [unit.file], None),
                schema=schema,
            )
            for unit in self._units
        ]


def read_units(plan: Plan, units: Sequence[Unit], *, replicas: int = 1) -> ray.data.Dataset:
    """The dataset of `units`, each one block, here and in the stages after it. replicas: for which
    it is read, which bounds how many units are read at once.

    Ray would divide blocks to make more of them, or because one is large; a unit must reach the
    sink whole, so the number of blocks is given and their size is not bounded but by the plan. It
    would also start a reader for every half of a CPU that is free: each is a process that takes a
    second of a core to come up, in which the stage that feeds the replicas is to come up too.
    """
    dataset = ray.data.read_datasource(
        UnitSource(plan, units),
        override_num_blocks=len(units),
        num_cpus=READER_CPUS,
        concurrency=min(len(units), _READERS_PER_REPLICA * replicas),  # Ray warns of more
    )
    dataset.context.target_max_block_size = None
    return dataset


def read_unit(store: Store, unit: Unit, layout: Layout) -> pa.Table:
    """The unit's rows, all of them, in order: those that cannot be read as error rows.

    Raises StoreError only where the store gave up after its retries: such a unit may well be
    readable tomorrow, so its rows must not be committed as errors today.
    """
    logger.debug("unit_read", unit_id=unit.unit_id, file=unit.file, rows=unit.row_count)
    read = read_parquet_unit if unit.format == "parquet" else read_tar_unit
    try:
        return read(store, unit, layout)
    except (ObjectGone, ReadError) as error:
        logger.warning("unit_unreadable", unit_id=unit.unit_id, file=unit.file, error=str(error))
        return unreadable_table(unit, layout, str(error))


def _blocks(store: Store, unit: Unit, layout: Layout) -> Iterator[pa.Table]:
    yield read_unit(store, unit, layout)
