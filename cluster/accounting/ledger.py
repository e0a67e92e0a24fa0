"""What committed rows cost. Computed once per unit and kept in its Parquet footer.

Sums are over integers (durations in nanoseconds), so that adding ledgers in any order and
grouping gives the same total. Modelled figures (FLOPs, KV bytes) and measured ones (seconds) are
never mixed, and a saving may be negative.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

import pyarrow as pa

from cluster.accounting.speedup import NANO, MeasuredRatio, measured_ratio, nanoseconds
from cluster.schema import COST_FIELD


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitLedger:
    """The account of committed rows: of one unit, or the sum of several.

    Tokens, nanoseconds, FLOPs and KV bytes are of the rows that succeeded, as they ran; `*_dense`
    of the same rows unpruned. The time of dense twins is in `control_pairs` alone.
    """

    rows: int = 0
    """All rows, failed ones included."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """Error rows by code."""
    attempts: int = 0
    """Attempts of all rows together."""
    recomputed: int = 0
    """Rows that took more than one attempt."""
    visual_tokens: int = 0
    """Visual tokens before pruning."""
    visual_tokens_kept: int = 0
    """Visual tokens after pruning, as budgets count them."""
    prompt_tokens: int = 0
    """Prompt tokens that entered the decoder."""
    completion_tokens: int = 0
    """Generated tokens."""
    nanoseconds: int = 0
    """Measured compute."""
    flops: Mapping[str, int] = field(default_factory=dict)
    """Modelled FLOPs by part of the model."""
    flops_dense: Mapping[str, int] = field(default_factory=dict)
    """Modelled FLOPs by part of the model, unpruned."""
    kv_bytes: int = 0
    """Modelled bytes of keys and values."""
    kv_bytes_dense: int = 0
    """Modelled bytes of keys and values, unpruned."""
    control_pairs: tuple[tuple[int, int], ...] = ()
    """(pruned, dense) nanoseconds of each control row."""
    agreements: int = 0
    """Control rows whose pruned and dense texts are equal."""

    @property
    def rows_failed(self) -> int:
        """Error rows of all codes."""
        return sum(self.failed.values())

    @property
    def seconds(self) -> float:
        """Measured seconds of the rows as they ran, without the dense twins of control rows."""
        return self.nanoseconds / NANO

    @property
    def control_rows(self) -> int:
        """Rows that ran both ways."""
        return len(self.control_pairs)

    @property
    def control_seconds(self) -> float:
        """Measured seconds spent on dense twins, the price of measuring."""
        return sum(dense for _, dense in self.control_pairs) / NANO

    def __add__(self, other: UnitLedger) -> UnitLedger:
        return _sum([self, other])

    def __sub__(self, other: UnitLedger) -> UnitLedger:
        """The account without rows that `other` is the account of."""
        return UnitLedger(
            **{
                part.name: _difference(getattr(self, part.name), getattr(other, part.name))
                for part in fields(UnitLedger)
            }
        )

    def to_json(self) -> str:
        """For the footer of a unit."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> UnitLedger:
        """The inverse of `to_json`. Raises ValueError or TypeError on anything else."""
        data = json.loads(text)
        pairs = tuple((pruned, dense) for pruned, dense in data.pop("control_pairs", ()))
        return cls(**data, control_pairs=pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLedger:
    """The sum over a run's committed units."""

    units: int = 0
    """Units summed."""
    total: UnitLedger = field(default_factory=UnitLedger)
    """Their sum."""

    @classmethod
    def of(cls, ledgers: Iterable[UnitLedger]) -> RunLedger:
        """The sum of unit ledgers."""
        ledgers = list(ledgers)
        return cls(units=len(ledgers), total=_sum(ledgers))

    def __add__(self, other: RunLedger) -> RunLedger:
        return RunLedger(units=self.units + other.units, total=self.total + other.total)

    def measured_ratio(self) -> MeasuredRatio | None:
        """The measured speed-up with its 95 % interval; None without control rows."""
        return measured_ratio(self.total.control_pairs)


def unit_ledger(table: pa.Table) -> UnitLedger:
    """The account of a labelled table, which still has its `_out_cost`."""
    totals: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    flops_dense: Counter[str] = Counter()
    pairs: list[tuple[int, int]] = []
    for row in table.select([*_COLUMNS, COST_FIELD.name]).to_pylist():
        attempts = row["attempts"] or 0
        totals.update(attempts=attempts, recomputed=int(attempts > 1))
        if row["error_code"] is not None:
            failed[row["error_code"]] += 1
            continue
        totals.update({name: row[name] or 0 for name in _COUNTED})
        spent = nanoseconds(row["seconds"] or 0.0)
        totals.update(nanoseconds=spent)
        if row["is_control"] and row["control_seconds"] is not None:
            pairs.append((spent, nanoseconds(row["control_seconds"])))
            totals.update(agreements=int(row["text"] == row["control_text"]))
        if row[COST_FIELD.name] is not None:
            cost = json.loads(row[COST_FIELD.name])
            flops.update(cost["flops"])
            flops_dense.update(cost["flops_dense"])
            totals.update(kv_bytes=cost["kv_bytes"], kv_bytes_dense=cost["kv_bytes_dense"])
    return UnitLedger(
        rows=table.num_rows,
        failed=dict(failed),
        flops=dict(flops),
        flops_dense=dict(flops_dense),
        control_pairs=tuple(pairs),
        **totals,
    )


_COUNTED = ("visual_tokens", "visual_tokens_kept", "prompt_tokens", "completion_tokens")
_COLUMNS = (
    *_COUNTED,
    "error_code",
    "attempts",
    "seconds",
    "is_control",
    "control_seconds",
    "text",
    "control_text",
)


def _sum(ledgers: Sequence[UnitLedger]) -> UnitLedger:
    return UnitLedger(
        **{
            part.name: _total([getattr(ledger, part.name) for ledger in ledgers])
            for part in fields(UnitLedger)
            if ledgers
        }
    )


def _total(values: Sequence[Any]) -> Any:
    """The sum of numbers, of mappings by name, or the tuples one after another."""
    if isinstance(values[0], int):
        return sum(values)
    if isinstance(values[0], tuple):
        return tuple(chain.from_iterable(values))
    names = sorted({name for mapping in values for name in mapping})
    return {name: sum(mapping.get(name, 0) for mapping in values) for name in names}


def _difference(whole: Any, part: Any) -> Any:
    """The inverse of `_total`, without names whose sum is zero then."""
    if isinstance(whole, int):
        return whole - part
    if isinstance(whole, tuple):
        return tuple((Counter(whole) - Counter(part)).elements())
    left = {name: value - part.get(name, 0) for name, value in whole.items()}
    return {name: value for name, value in left.items() if value or name not in part}
