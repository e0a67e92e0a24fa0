"""The commit: one unit becomes one Parquet object by one conditional PUT, or nothing at all.

Rows, ledger and the mark that the unit is done are the same object, so they cannot disagree. Of
two writers of one unit the second drops its copy: that is no error.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import structlog
from ray.data.block import Block
from ray.data.datasource import Datasink, WriteResult

from cluster.accounting.ledger import UnitLedger, unit_ledger
from cluster.errors import CommitRefused, ErrorShareExceeded
from cluster.events import OnEvent, RunEvent, ignore_event
from cluster.output.checks import ExpectedUnits, check_complete, check_pruning_claims, check_types
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.output.unit_writes import write_units
from cluster.schema import is_internal, output_schema

logger = structlog.get_logger(__name__)

OnCommit: TypeAlias = Callable[[str, UnitLedger], None]
"""Called after each commit with unit id and the committed ledger, whoever wrote it; more than once
for one unit if a write is retried. It must not raise."""
StopReason: TypeAlias = Callable[[], str | None]
"""Why the run should stop, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOutcome:
    """What became of one write of a unit."""

    unit_id: str
    """The unit."""
    rows: int
    """Rows of the committed object."""
    won: bool
    """True: the committed object is this write's. False: another writer was first."""


def commit_unit(
    table: pa.Table,
    *,
    expected: ExpectedUnits,
    output: RunOutput,
    writer: str,
    on_commit: OnCommit | None = None,
) -> CommitOutcome:
    """Commits the labelled rows of one unit, in any order.

    writer: unique to this call. Raises CommitRefused where the rows are not exactly the planned
    ones, where a column has a value that its type has not, or where pruning did not do what a row
    claims; StoreError where the store gave up.
    """
    unit_id = check_complete(table, expected)
    check_pruning_claims(table, unit_id)
    ledger = unit_ledger(table)
    rows = _committed_columns(table, expected, unit_id)
    won = output.commit_unit(unit_id, rows, ledger, writer=writer, plan=expected.plan)
    if not won:
        logger.info("commit_lost", run_id=expected.run_id, unit_id=unit_id)
        (ledger,) = output.ledgers([unit_id])
    else:
        logger.info("unit_committed", run_id=expected.run_id, unit_id=unit_id, rows=ledger.rows)
    if on_commit is not None:
        on_commit(unit_id, ledger)
    return CommitOutcome(unit_id=unit_id, rows=ledger.rows, won=won)


class CommitSink(Datasink[list[CommitOutcome]]):
    """Commits units. Ray may rerun any write at any time."""

    def __init__(
        self,
        manifest: Manifest,
        output: RunOutput,
        *,
        on_commit: OnCommit | None = None,
        on_event: OnEvent = ignore_event,
        stop_reason: StopReason | None = None,
    ) -> None:
        """stop_reason: asked before a unit with error rows is committed: rows that fail at once
        pass the labeller long before the first of them are counted."""
        self._stop_reason = stop_reason
        self._expected = ExpectedUnits.of(manifest)
        self._output = output
        self._on_commit = on_commit
        self._on_event = on_event

    def get_name(self) -> str:
        """The operator's name in Ray Data."""
        return "Commit"

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[CommitOutcome]:
        """Commits the packed units that `blocks` hold. Raises what `commit_unit` raises, and
        ErrorShareExceeded where the run should stop."""
        return write_units(blocks, self._commit, self._output, self._on_event)

    def on_write_complete(self, write_result: WriteResult[list[CommitOutcome]]) -> None:
        """Logs how many commits were made and how many another writer had made before."""
        outcomes = [outcome for part in write_result.write_returns for outcome in part]
        lost = sum(not outcome.won for outcome in outcomes)
        logger.info(
            "write_complete",
            run_id=self._expected.run_id,
            committed=len(outcomes) - lost,
            lost_races=lost,
        )

    def _commit(self, table: pa.Table) -> CommitOutcome:
        if self._stop_reason is not None and table["error_code"].null_count < len(table):
            reason = self._stop_reason()
            if reason is not None:
                raise ErrorShareExceeded(reason)
        outcome = commit_unit(
            table,
            expected=self._expected,
            output=self._output,
            # Of this very attempt: a rerun of the same task is another writer.
            writer=uuid.uuid4().hex,
            on_commit=self._on_commit,
        )
        if not outcome.won:
            self._on_event(RunEvent.COMMIT_LOST, 1)
        return outcome


def _committed_columns(table: pa.Table, expected: ExpectedUnits, unit_id: str) -> pa.Table:
    """The committed columns in their order and types, rows in unit order."""
    schema = output_schema(expected.source_schema, expected.kind)
    names = {name for name in table.column_names if not is_internal(name)}
    if names != set(schema.names):
        missing, extra = sorted(set(schema.names) - names), sorted(names - set(schema.names))
        raise CommitRefused(f"unit {unit_id}: columns missing {missing}, unknown {extra}")
    return check_types(table, schema, unit_id).sort_by("unit_row")
