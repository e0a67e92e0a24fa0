"""Failed rows of a run that are asked again: which they are, and their part of a unit as read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import pyarrow as pa

from cluster.corpus.packed import PACKED_SCHEMA, pack_unit, unpack_units
from cluster.errors import RowError, UsageError
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput

FailedRows: TypeAlias = Mapping[str, Collection[int]]
"""Row numbers by unit id."""

# A prompt that the model cannot take stays one as long as the corpus and the prompt are the same.
# Whatever else failed may have had a cause that has passed: a mount, memory, a decoder's bound.
_FINAL_STAGES: Final = frozenset({"prompt"})
_COLUMNS: Final = ["unit_row", "error_code", "error_stage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorChoice:
    """Which failed rows are asked again."""

    codes: frozenset[str] = frozenset()
    """Their error codes; empty for every row that may succeed over an unchanged corpus."""

    @classmethod
    def parse(cls, text: str) -> ErrorChoice:
        """Comma-separated codes; empty for the default."""
        return cls(codes=frozenset(filter(None, (code.strip() for code in text.split(",")))))

    def takes(self, code: str | None, stage: str | None) -> bool:
        """Whether a row with this error, or None for none, is asked again."""
        if code is None:
            return False
        return code in self.codes if self.codes else stage not in _FINAL_STAGES


def asked_by_default(code: str) -> bool:
    """Whether rows that failed with this code are asked again where no codes are named; so too for
    a code that this version does not know."""
    return code not in {kind.code for kind in _kinds(RowError) if kind.stage in _FINAL_STAGES}


def count_rows(failed: FailedRows) -> int:
    """Rows of all units."""
    return sum(map(len, failed.values()))


def find_failed_rows(output: RunOutput, manifest: Manifest, choice: ErrorChoice) -> FailedRows:
    """The committed rows that `choice` takes, by unit, units in corpus order.

    Raises UsageError for a code that no row has and no version knows, StoreError where the output
    cannot be read.
    """
    committed = output.committed_units()
    done = [unit.unit_id for unit in manifest.units if unit.unit_id in committed]
    failed = {
        unit_id: footer.ledger.failed.keys()
        for unit_id, footer in zip(done, output.footers(done), strict=True)
        if footer.ledger.failed
    }
    present = {code for codes in failed.values() for code in codes}
    unknown = choice.codes - present - {kind.code for kind in _kinds(RowError)}
    if unknown:
        raise UsageError(
            f"--retry-errors {','.join(sorted(unknown))}: no such error code; the failed rows of "
            f"this run have {', '.join(sorted(present)) or 'none'}"
        )
    suspects = [id for id, codes in failed.items() if not choice.codes or choice.codes & codes]
    found: dict[str, tuple[int, ...]] = {}
    for unit_id, table in zip(suspects, output.read_units(suspects, _COLUMNS), strict=True):
        rows = tuple(
            row["unit_row"]
            for row in table.to_pylist()
            if choice.takes(row["error_code"], row["error_stage"])
        )
        if rows:
            found[unit_id] = rows
    return found


def select_rows(block: pa.Table, failed: FailedRows) -> pa.Table:
    """The packed units of a block, each with its failed rows alone."""
    units = [pack_unit(_only(table, failed)) for table in unpack_units(block)]
    return pa.concat_tables([PACKED_SCHEMA.empty_table(), *units])


def _only(table: pa.Table, failed: FailedRows) -> pa.Table:
    names, numbers = table["_in_unit"].to_pylist(), table["_in_row"].to_pylist()
    wanted = [
        number in failed.get(unit_id, ()) for unit_id, number in zip(names, numbers, strict=True)
    ]
    return table.filter(pa.array(wanted, pa.bool_()))


def _kinds(kind: type[RowError]) -> Iterator[type[RowError]]:
    """Every kind of a row error."""
    for each in kind.__subclasses__():
        yield each
        yield from _kinds(each)
