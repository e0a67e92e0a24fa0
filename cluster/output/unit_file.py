"""The object of one committed unit: its rows, and in its footer who wrote it and what it cost.

sppruner.ledger          the unit's ledger
sppruner.run             the run it belongs to; versions before wrote it into the rows alone
sppruner.unit            which of its units it is; versions before wrote it into the rows alone
sppruner.plan            which units its run has, itself among them: the digest of their ids
sppruner.generation      how often failed rows were asked again, and what that mended
sppruner.sha256          of all bytes in front of the footer, which are the rows
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.accounting.ledger import UnitLedger
from cluster.store import RangedFile

_LEDGER: Final = "sppruner.ledger"
_RUN: Final = "sppruner.run"
_UNIT: Final = "sppruner.unit"
_PLAN: Final = "sppruner.plan"
_GENERATION: Final = "sppruner.generation"
_SHA256: Final = "sppruner.sha256"
_FOOTER_END: Final = 8  # bytes: length of the footer, and the format's mark
_RUN_COLUMN: Final = "run_id"
_UNIT_COLUMN: Final = "unit_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """One time that failed rows of a unit were asked again."""

    writer: str
    """Of the attempt that asked; it replaces the unit once, however often it is repeated."""
    asked: int
    """Rows that were asked again."""
    mended: int
    """Rows among them that succeeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFooter:
    """What a committed unit says about itself."""

    ledger: UnitLedger
    """What its rows cost."""
    run_id: str | None
    """The run that it belongs to; None where it does not say."""
    unit_id: str | None
    """Which unit it is, whatever its object is called; None where it does not say."""
    retries: tuple[Retry, ...] = ()
    """Every time its failed rows were asked again; as many generations has the object."""
    plan: str | None = None
    """See `Manifest.plan`; None where it does not say."""

    def to_metadata(self) -> dict[str, str]:
        """The pairs in the object's footer."""
        pairs = {_LEDGER: self.ledger.to_json()}
        if self.run_id is not None:
            pairs[_RUN] = self.run_id
        if self.unit_id is not None:
            pairs[_UNIT] = self.unit_id
        if self.plan is not None:
            pairs[_PLAN] = self.plan
        if self.retries:
            retries = [asdict(retry) for retry in self.retries]
            record = {"generation": len(retries), "retries": retries}
            pairs[_GENERATION] = json.dumps(record, separators=(",", ":"))
        return pairs


def write_unit_file(table: pa.Table, footer: UnitFooter) -> bytes:
    """The object of a unit."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as parquet:
        parquet.write_table(table, row_group_size=max(1, table.num_rows))
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        parquet.add_key_value_metadata({**footer.to_metadata(), _SHA256: digest})
    return buffer.getvalue()


def has_written_rows(data: bytes) -> bool:
    """Whether the rows of a unit's object are, byte by byte, those that were written with its
    footer. Raises ArrowException for what is no Parquet file."""
    metadata: Mapping[bytes, bytes] = pq.read_metadata(io.BytesIO(data)).metadata or {}
    footer = int.from_bytes(data[-_FOOTER_END:][:4], "little")
    rows = memoryview(data)[: len(data) - footer - _FOOTER_END]
    return metadata.get(_SHA256.encode()) == hashlib.sha256(rows).hexdigest().encode()


def read_footer(file: RangedFile) -> UnitFooter | None:
    """The footer of an object; None for a Parquet file that is no unit of any run. Raises
    ArrowException for other files, ValueError or TypeError for a unit of a later version."""
    found = pq.read_metadata(file)
    pairs: Mapping[bytes, bytes] = found.metadata or {}
    if _LEDGER.encode() not in pairs:
        return None

    def said(key: str, column: str) -> str | None:
        value = pairs.get(key.encode())
        return _of_rows(found, column) if value is None else value.decode()

    retries = json.loads(pairs.get(_GENERATION.encode(), b'{"retries": []}'))["retries"]
    return UnitFooter(
        ledger=UnitLedger.from_json(pairs[_LEDGER.encode()]),
        run_id=said(_RUN, _RUN_COLUMN),
        unit_id=said(_UNIT, _UNIT_COLUMN),
        retries=_retries(retries),
        plan=pairs[_PLAN.encode()].decode() if _PLAN.encode() in pairs else None,
    )


def _retries(records: Sequence[Mapping[str, Any]]) -> tuple[Retry, ...]:
    return tuple(Retry(**record) for record in records)


def _of_rows(found: pq.FileMetaData, name: str) -> str | None:
    """What the rows of a unit have in a column, from its statistics; None where there are none.
    Rows of two runs or of two units in one object are refused at the commit."""
    for group in range(found.num_row_groups):
        for number in range(found.num_columns):
            column = found.row_group(group).column(number)
            statistics = column.statistics if column.path_in_schema == name else None
            if statistics is not None and statistics.has_min_max:
                return str(statistics.min)
    return None
