"""The commit: one unit becomes one Parquet object by one conditional PUT, or nothing at all.

Data, ledger and the mark that the unit is done are the same object, so they cannot disagree.
Whoever comes second is told so and drops its copy: that is no error.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import structlog
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from cluster.accounting.ledger import LEDGER_KEY, UnitLedger, read_ledgers, unit_ledger
from cluster.errors import CommitRefused
from cluster.output.checks import ExpectedUnits, check_complete, check_pruning_claims
from cluster.runs.planning import Plan, unit_key
from cluster.schema import is_internal, output_schema
from cluster.store import Store, open_store

logger = structlog.get_logger(__name__)

# Called after each commit with run id, unit id and the ledger that was committed, by whichever
# writer: more than once for one unit if a write is retried. It must not raise.
OnCommit: TypeAlias = Callable[[str, str, UnitLedger], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOutcome:
    """won: our copy is the committed one; otherwise another writer's was there first."""

    unit_id: str
    rows: int
    won: bool


def commit_unit(
    table: pa.Table,
    *,
    terms: ExpectedUnits,
    store: Store,
    writer: str,
    on_commit: OnCommit | None = None,
) -> CommitOutcome:
    """Commits the labelled rows of one unit, in any order.

    Raises CommitRefused where they are not exactly the planned rows, or are called pruned and
    were not; StoreError where the store gave up.
    """
    unit_id = check_complete(table, terms)
    check_pruning_claims(table, unit_id)
    ledger = unit_ledger(table)
    data = _encoded(_committed(table, terms, unit_id), ledger)
    won = store.put_if_absent(unit_key(unit_id), data, writer=writer)
    if not won:
        logger.info("commit_lost", run_id=terms.run_id, unit_id=unit_id)
        (ledger,) = read_ledgers(store, [unit_id])
    else:
        logger.info("unit_committed", run_id=terms.run_id, unit_id=unit_id, rows=ledger.rows)
    if on_commit is not None:
        on_commit(terms.run_id, unit_id, ledger)
    return CommitOutcome(unit_id=unit_id, rows=ledger.rows, won=won)


class CommitSink(Datasink[list[CommitOutcome]]):
    """Commits each unit as soon as all its rows are there. Ray may rerun any write at any time.

    `outcomes` holds what was committed once the dataset has been written.
    """

    def __init__(self, plan: Plan, *, on_commit: OnCommit | None = None) -> None:
        self._terms = ExpectedUnits.of(plan)
        self._store = open_store(plan.output_uri)
        self._on_commit = on_commit
        self.outcomes: list[CommitOutcome] = []

    def get_name(self) -> str:
        return "Commit"

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[CommitOutcome]:
        outcomes: list[CommitOutcome] = []
        waiting: dict[str, list[pa.Table]] = {}
        for block in blocks:
            for unit_id, part in _by_unit(BlockAccessor.for_block(block).to_arrow()):
                parts = waiting.setdefault(unit_id, [])
                parts.append(part)
                if sum(len(part) for part in parts) >= self._terms.rows.get(unit_id, 0):
                    outcomes.append(self._commit(pa.concat_tables(waiting.pop(unit_id))))
        for parts in waiting.values():
            # Too few rows: commit_unit says which unit and how many.
            outcomes.append(self._commit(pa.concat_tables(parts)))
        return outcomes

    def on_write_complete(self, write_result: WriteResult[list[CommitOutcome]]) -> None:
        self.outcomes = [outcome for part in write_result.write_returns for outcome in part]
        lost = sum(not outcome.won for outcome in self.outcomes)
        committed = len(self.outcomes) - lost
        logger.info(
            "write_complete", run_id=self._terms.run_id, committed=committed, lost_races=lost
        )

    def _commit(self, table: pa.Table) -> CommitOutcome:
        # The writer is this very attempt: a rerun of the same task is another writer.
        return commit_unit(
            table,
            terms=self._terms,
            store=self._store,
            writer=uuid.uuid4().hex,
            on_commit=self._on_commit,
        )


def _by_unit(table: pa.Table) -> list[tuple[str, pa.Table]]:
    ids = table["unit_id"].to_pylist()
    distinct = dict.fromkeys(ids)
    if len(distinct) == 1:
        return [(ids[0], table)]
    return [
        (unit_id, table.filter(pa.array([other == unit_id for other in ids])))
        for unit_id in distinct
    ]


def _committed(table: pa.Table, terms: ExpectedUnits, unit_id: str) -> pa.Table:
    """The committed columns in their order and types, rows in unit order."""
    schema = output_schema(terms.source_schema, terms.kind)
    names = {name for name in table.column_names if not is_internal(name)}
    if names != set(schema.names):
        missing, extra = sorted(set(schema.names) - names), sorted(names - set(schema.names))
        raise CommitRefused(f"unit {unit_id}: columns missing {missing}, unknown {extra}")
    return table.select(schema.names).cast(schema).sort_by("unit_row")


def _encoded(table: pa.Table, ledger: UnitLedger) -> bytes:
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        writer.add_key_value_metadata({LEDGER_KEY: ledger.to_json()})
    return buffer.getvalue().to_pybytes()
