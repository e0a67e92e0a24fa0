"""The corpus as a Ray Data source.

Guarantees: a unit is one packed row and one block, here and in the stages after it; units of one
row group are one read task, which decodes the group once; a unit that cannot be read yields an
error row for each planned row, after a second opinion from another node where its object seems
gone; a unit whose store gave up is left for a later pass.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import groupby

import pyarrow as pa
import ray
import ray.data
import structlog
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayError

from cluster.corpus.columns import ColumnMapping
from cluster.corpus.packed import PACKED_SCHEMA, SMALLEST_BLOCK, pack_unit
from cluster.corpus.parquet_rows import Footers, read_parquet_units
from cluster.corpus.table import build_error_table, join_tables
from cluster.corpus.unit import Unit
from cluster.corpus.webdataset import read_tar_unit
from cluster.errors import ObjectGone, ReadError, StoreError
from cluster.events import OnEvent, RunEvent, ignore_event
from cluster.other_node import other_nodes
from cluster.store import Store, open_store
from cluster.store.patience import hear_outages

logger = structlog.get_logger(__name__)

READER_CPUS = 0.5
"""CPUs of one read task. A reader mostly waits for the store; with a whole CPU each, readers would
never be scheduled on a small machine whose replicas hold all but one CPU."""
# At 10 s for a unit of 256 rows, two readers deliver 50 rows/s.
_READERS_PER_REPLICA = 2

# A store that gave up once is asked for so long, in the same process, until it answers again: every
# unit behind an outage would wait for minutes else.
_AFTER_GIVING_UP_S = 20.0
_gave_up: set[str] = set()
_ISOLATED_FROM = 2  # attempts are counted from 0
# Of units that another node reads for this one; more would fill its memory.
_BLOCKS_AHEAD = 2


class UnitSource(Datasource):
    """Reads units, packed. Images stay encoded; a unit's schema is `input_schema`'s."""

    def __init__(
        self,
        source: str,
        mapping: ColumnMapping,
        units: Sequence[Unit],
        on_event: OnEvent = ignore_event,
    ) -> None:
        """source: URI of the store that `Unit.file` is relative to."""
        super().__init__()
        self._on_event = on_event
        self._store = open_store(source)
        self._mapping = mapping
        self._units = tuple(units)
        self.tasks = [tuple(group) for _, group in groupby(units, _read_together)]

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
        """One task for units of one row group, and for each other unit. `parallelism` is ignored,
        because a unit is never divided."""
        return [
            ReadTask(
                partial(_read_blocks, self._store, units, self._mapping, self._on_event),
                BlockMetadata(
                    sum(unit.row_count for unit in units),
                    sum(unit.size_bytes for unit in units),
                    [units[0].file],
                    None,
                ),
                schema=PACKED_SCHEMA,
            )
            for units in self.tasks
        ]


def read_units(
    source: str,
    mapping: ColumnMapping,
    units: Sequence[Unit],
    *,
    replicas: int = 1,
    on_event: OnEvent = ignore_event,
) -> ray.data.Dataset:
    """The dataset of `units`, one block each, packed; in this stage and the stages after it.

    source: URI of the store that `Unit.file` is relative to. replicas: replicas that the dataset
    feeds; at most two units are read concurrently for each. on_event: told of units that are read
    again elsewhere or left out, in any process. A unit whose store gave up is left out.

    Without a bound on concurrency Ray starts a reader for every free half CPU; each of these
    processes takes a second of a core to start, while the labelling stage starts too.
    """
    datasource = UnitSource(source, mapping, units, on_event)
    tasks = len(datasource.tasks)
    dataset = ray.data.read_datasource(
        datasource,
        override_num_blocks=tasks,  # with more than that, Ray would divide what tasks return
        num_cpus=READER_CPUS,
        concurrency=min(tasks, _READERS_PER_REPLICA * replicas),  # Ray warns above the tasks
    )
    dataset.context.target_max_block_size = SMALLEST_BLOCK
    return dataset


def read_unit(store: Store, unit: Unit, mapping: ColumnMapping) -> pa.Table:
    """All planned rows of the unit, in order; rows that cannot be read are error rows.

    Raises StoreError where the store gave up after its retries. Such a unit may be readable in a
    later attempt, so no error rows are made of it.
    """
    (table,) = _read_tables(store, [unit], mapping, last_word=True)
    return table


def _read_together(unit: Unit) -> tuple[object, ...]:
    """Equal for units of one row group, which are read in one pass; else the unit's own."""
    if unit.parts or unit.row_group is None:
        return (unit.unit_id,)
    return (unit.file, unit.row_group)


def _read_blocks(
    store: Store, units: Sequence[Unit], mapping: ColumnMapping, on_event: OnEvent = ignore_event
) -> Iterator[pa.Table]:
    """The units, packed, in a Ray task; those that the store does not give are left out."""
    with hear_outages(on_event):
        moved = None if store.is_here() else _read_where_it_is(store, units, mapping, on_event)
        yield from moved or _read_or_leave(store, units, mapping, on_event)


def _read_where_it_is(
    store: Store, units: Sequence[Unit], mapping: ColumnMapping, on_event: OnEvent
) -> Iterator[pa.Table] | None:
    """What `_read_or_leave` gives on a node that sees the store; None where none does."""
    read = ray.remote(_read_if_here)
    for node in other_nodes():
        blocks = iter(
            read.options(
                num_cpus=0,
                num_returns="streaming",
                scheduling_strategy=node,
                _generator_backpressure_num_objects=_BLOCKS_AHEAD,
            ).remote(store, tuple(units), mapping, on_event)
        )
        try:
            sees_it = ray.get(next(blocks))
        except RayError as error:
            logger.warning("node_cannot_help", error=type(error).__name__)
            continue
        if sees_it:
            logger.warning("units_moved", uri=store.uri, units=len(units))
            on_event(RunEvent.UNIT_MOVED, len(units))
            return _forward(blocks, units, on_event)
    return None


def _forward(
    blocks: Iterator[ray.ObjectRef[pa.Table]], units: Sequence[Unit], on_event: OnEvent
) -> Iterator[pa.Table]:
    read = 0
    try:
        for block in blocks:
            yield ray.get(block)
            read += 1
    except RayError as error:  # the node died, or the process there
        logger.warning("units_deferred", units=len(units) - read, error=type(error).__name__)
        on_event(RunEvent.UNIT_DEFERRED, len(units) - read)


def _read_if_here(
    store: Store, units: Sequence[Unit], mapping: ColumnMapping, on_event: OnEvent
) -> Iterator[pa.Table | bool]:
    """Whether this node sees the store, and then what `_read_or_leave` gives."""
    sees_it = store.is_here()
    yield sees_it
    if sees_it:
        with hear_outages(on_event):
            yield from _read_or_leave(store, units, mapping, on_event)


def _read_or_leave(
    store: Store, units: Sequence[Unit], mapping: ColumnMapping, on_event: OnEvent
) -> Iterator[pa.Table]:
    read = 0
    store = store.with_patience(_AFTER_GIVING_UP_S) if store.uri in _gave_up else store
    try:
        try:
            for table in _attempt(store, units, mapping, last_word=False):
                yield pack_unit(table)
                read += 1
                _gave_up.discard(store.uri)
        except (ObjectGone, MemoryError) as error:
            # What this node cannot see or hold another may: a mount is missing here, or memory.
            logger.warning("second_opinion", unit_id=units[read].unit_id, error=str(error))
            on_event(RunEvent.UNIT_REREAD, len(units) - read)
            for table in _ask_elsewhere(store, units[read:], mapping):
                yield pack_unit(table)
                read += 1
    except (StoreError, RayError) as error:  # RayError: the process that was asked elsewhere died
        left = [unit.unit_id for unit in units[read:]]
        logger.warning("units_deferred", unit_ids=left, error=str(error))
        on_event(RunEvent.UNIT_DEFERRED, len(left))
        _gave_up.add(store.uri)


def _attempt(
    store: Store, units: Sequence[Unit], mapping: ColumnMapping, *, last_word: bool
) -> Iterator[pa.Table]:
    """Raises what `_read_tables` raises. Ray repeats a task whose process died: from the third time
    on the units are read in processes of their own, since it may be they that end it."""
    if task_attempt() < _ISOLATED_FROM:
        yield from _read_tables(store, units, mapping, last_word=last_word)
        return
    for unit in units:
        yield _read_isolated(store, unit, mapping, last_word=last_word)


def _read_isolated(
    store: Store, unit: Unit, mapping: ColumnMapping, *, last_word: bool
) -> pa.Table:
    """The unit's rows, read in a process of its own. One that dies makes error rows of them."""
    logger.warning("unit_isolated", unit_id=unit.unit_id, file=unit.file)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_read_one, store, unit, mapping, last_word).result()
        except BrokenProcessPool:
            return build_error_table(unit, mapping, "reading it ends the process that does")


def _read_one(store: Store, unit: Unit, mapping: ColumnMapping, last_word: bool) -> pa.Table:
    (table,) = _read_tables(store, [unit], mapping, last_word=last_word)
    return table


def _ask_elsewhere(
    store: Store, units: Sequence[Unit], mapping: ColumnMapping
) -> Iterator[pa.Table]:
    """The same units read on another node of the cluster, or here again where it has no other."""
    read = ray.remote(_last_word).options(
        num_cpus=0,
        num_returns="streaming",
        scheduling_strategy=next(iter(other_nodes()), "DEFAULT"),
        _generator_backpressure_num_objects=_BLOCKS_AHEAD,
    )
    for block in read.remote(store, tuple(units), mapping):
        answer = ray.get(block)
        if isinstance(answer, StoreError):
            raise answer
        yield answer


def _last_word(
    store: Store, units: Sequence[Unit], mapping: ColumnMapping
) -> Iterator[pa.Table | StoreError]:
    """As values, since Ray wraps what a task raises."""
    try:
        yield from _attempt(store, units, mapping, last_word=True)
    except StoreError as error:
        yield error


def task_attempt() -> int:
    """How often Ray has begun this task before; 0 outside Ray."""
    worker = ray._private.worker.global_worker
    if not ray.is_initialized() or worker.mode != ray.WORKER_MODE:
        return 0
    attempt: int = worker.core_worker.get_current_task_attempt_number()
    return attempt


def _read_tables(
    store: Store, units: Sequence[Unit], mapping: ColumnMapping, *, last_word: bool
) -> Iterator[pa.Table]:
    """The rows of each unit. Several units are of one row group.

    last_word: an object that is gone, and rows that do not fit into memory, are error rows; else
    ObjectGone and MemoryError are raised. Raises StoreError where the store gave up.
    """
    footers = Footers(store)
    for unit in units:
        logger.debug("unit_read", unit_id=unit.unit_id, file=unit.file, rows=unit.row_count)
    if len(units) > 1:
        yield from _read_pieces(store, footers, units, mapping, last_word)
        return
    for unit in units:
        tables = [
            table
            for piece in unit.pieces
            for table in _read_pieces(store, footers, [piece], mapping, last_word)
        ]
        yield join_tables(unit, tables) if unit.parts else tables[0]


def _read_pieces(
    store: Store,
    footers: Footers,
    pieces: Sequence[Unit],
    mapping: ColumnMapping,
    last_word: bool,
) -> Iterator[pa.Table]:
    read = 0
    try:
        if pieces[0].format == "parquet":
            for table in read_parquet_units(footers, pieces, mapping):
                yield table
                read += 1
        else:
            yield read_tar_unit(store, pieces[0], mapping)
        return
    except (ObjectGone, MemoryError) as error:
        if not last_word:
            raise
        reason = str(error) or "it does not fit into memory"
    except ReadError as error:
        reason = str(error)
    except StoreError:
        raise
    except Exception as error:
        # Parsers raise anything on hostile bytes. One unit of them must not end the run, at every
        # resume again.
        logger.exception("unit_unreadable", file=pieces[read].file)
        reason = f"{type(error).__name__}: {error}"[:300]
    for piece in pieces[read:]:
        logger.warning("unit_unreadable", unit_id=piece.unit_id, file=piece.file, error=reason)
        yield build_error_table(piece, mapping, reason)
