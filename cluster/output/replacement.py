"""Failed rows of a committed unit replaced by what asking them again gave, in the same object.

Guarantees: the object is replaced whole, by one PUT on the condition that it still is the version
that was merged, so readers of the prefix see each row once at any moment; an answer is never
replaced; an attempt that asks again counts once, however often its write is repeated; the ledger is
that of the rows that the object has.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import structlog
from ray.data.block import Block
from ray.data.datasource import Datasink

from cluster.accounting.ledger import unit_ledger
from cluster.errors import StoreError
from cluster.events import OnEvent, ignore_event
from cluster.output.checks import ExpectedUnits, check_complete, check_pruning_claims, check_types
from cluster.output.commit import OnCommit
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.output.unit_file import Retry, UnitFooter
from cluster.output.unit_writes import write_units
from cluster.schema import PLANNED_FIELD

logger = structlog.get_logger(__name__)

# Each refused PUT is another attempt's that succeeded. Attempts ask a unit once each, so more than
# a few refusals are no race but a store that does not compare.
_TRIES: Final = 20
_ERROR_COLUMNS: Final = ("error_code", "error_message", "error_stage")
_SUMMED: Final = ("attempts", "discarded_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedRows:
    """A unit with some of its failed rows replaced."""

    table: pa.Table
    """All rows of the unit, in unit order."""
    asked: int
    """Rows replaced."""
    mended: int
    """Replaced rows that are answers now."""


def merge_rows(committed: pa.Table, labelled: pa.Table) -> MergedRows:
    """The unit with its failed rows replaced by those of `labelled`; rows that are answers already
    stay, so that of two attempts the first answer counts.

    committed: all rows of the unit. labelled: some of them, labelled again, as the sink gets them.
    A row's attempts and discarded seconds are summed. A row that fails again has the newest error;
    where it could not even be read, it keeps the key and the source columns that it had. Raises
    CommitRefused for values of other types than the unit has.
    """
    open_rows = committed.filter(pc.is_valid(committed["error_code"]))
    # Each row once, whichever copy: a rerun of Ray's may have handed over two.
    by_row = {number: at for at, number in enumerate(labelled["unit_row"].to_pylist())}
    numbers = [n for n in open_rows["unit_row"].to_pylist() if n in by_row]
    before = _rows(open_rows, numbers)
    after = labelled.take(pa.array([by_row[number] for number in numbers], pa.int64()))
    for name in _SUMMED:
        both = pc.add(pc.fill_null(before[name], 0), pc.fill_null(after[name], 0))
        after = _with_column(after, name, both)
    unread = pc.fill_null(pc.equal(after["error_stage"], "read"), False)
    # What it was in a block is what the block has measured.
    after = _with_column(after, "is_control", before["is_control"])
    as_before = before
    for name in (*_ERROR_COLUMNS, *_SUMMED):
        as_before = _with_column(as_before, name, after[name])
    schema, unit_id = committed.schema, committed["unit_id"][0].as_py()
    after, as_before = (check_types(each, schema, unit_id) for each in (after, as_before))
    changed = pa.concat_tables([after.filter(pc.invert(unread)), as_before.filter(unread)])
    same = committed.filter(
        pc.invert(pc.is_in(committed["unit_row"], pa.array(numbers, pa.int32())))
    )
    return MergedRows(
        table=pa.concat_tables([same, changed]).sort_by("unit_row"),
        asked=len(numbers),
        mended=changed["error_code"].null_count,
    )


def replace_rows(
    labelled: pa.Table, *, expected: ExpectedUnits, output: RunOutput, attempt: str
) -> UnitFooter:
    """Replaces failed rows of one committed unit, and returns the footer that it has then.

    labelled: rows of the unit, labelled again. attempt: names the attempt that asks again; a unit
    that it has replaced is left as it is. Raises CommitRefused for rows that may not be committed,
    StoreError where the store gave up.
    """
    (unit_id,) = set(labelled["unit_id"].to_pylist())
    for _ in range(_TRIES):
        unit = output.open_unit(unit_id)
        if any(retry.writer == attempt for retry in unit.footer.retries):
            return unit.footer
        merged = merge_rows(unit.table, labelled)
        if not merged.asked:
            return unit.footer  # others have mended all of them meanwhile
        planned = labelled[PLANNED_FIELD.name][0].as_py()
        whole = pa.array([planned] * len(merged.table), PLANNED_FIELD.type)
        check_complete(merged.table.append_column(PLANNED_FIELD, whole), expected)
        check_pruning_claims(merged.table, unit_id)
        retry = Retry(writer=attempt, asked=merged.asked, mended=merged.mended)
        footer = UnitFooter(
            ledger=unit_ledger(merged.table),
            run_id=expected.run_id,
            unit_id=unit_id,
            retries=(*unit.footer.retries, retry),
            plan=expected.plan,
        )
        if output.replace_unit(unit, merged.table, footer, writer=uuid.uuid4().hex):
            logger.info("unit_replaced", unit_id=unit_id, asked=retry.asked, mended=retry.mended)
            return footer
        logger.info("replace_lost", unit_id=unit_id)
    raise StoreError(
        f"{output.uri}: unit {unit_id} was another version at each of {_TRIES} writes: the store "
        "must honour If-Match on PUT, and its clients must see the objects they wrote"
    )


class RetrySink(Datasink[int]):
    """Replaces failed rows, unit by unit. Ray may rerun any write at any time."""

    def __init__(
        self,
        manifest: Manifest,
        output: RunOutput,
        *,
        on_commit: OnCommit,
        on_event: OnEvent = ignore_event,
    ) -> None:
        self._expected = ExpectedUnits.of(manifest)
        self._output = output
        self._on_commit = on_commit
        self._on_event = on_event
        self.attempt = uuid.uuid4().hex
        """What its replacements have as `Retry.writer`."""

    def get_name(self) -> str:
        """The operator's name in Ray Data."""
        return "Replace"

    def write(self, blocks: Iterable[Block], ctx: Any) -> int:
        """Replaces the rows of the packed units that `blocks` hold; returns how many units these
        are. Raises what `replace_rows` raises."""
        return len(write_units(blocks, self._replace, self._output, self._on_event))

    def _replace(self, labelled: pa.Table) -> None:
        footer = replace_rows(
            labelled, expected=self._expected, output=self._output, attempt=self.attempt
        )
        unit_id = labelled["unit_id"][0].as_py()
        self._on_commit(unit_id, footer.ledger)


def _rows(table: pa.Table, numbers: list[int]) -> pa.Table:
    at = {number: index for index, number in enumerate(table["unit_row"].to_pylist())}
    return table.take(pa.array([at[number] for number in numbers], pa.int64()))


def _with_column(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), table.schema.field(name), values)
