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

from cluster.accounting.speedup import (
    NANO,
    Block,
    MeasuredRatio,
    measured_ratio,
    nanoseconds,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitLedger:
    """The account of committed rows: of one unit, or the sum of several.

    Tokens, nanoseconds, FLOPs and KV bytes are of the rows that succeeded, with the tokens they ran
    with; `*_dense` of the same rows unpruned. Nanoseconds are those of the committed answers alone:
    what measuring and asking again cost is beside them.
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
    """Measured replica time: of the wall time that a replica had rows, the part of each of them."""
    flops: Mapping[str, int] = field(default_factory=dict)
    """Modelled FLOPs by part of the model."""
    flops_dense: Mapping[str, int] = field(default_factory=dict)
    """Modelled FLOPs by part of the model, unpruned."""
    kv_bytes: int = 0
    """Modelled bytes of keys and values."""
    kv_bytes_dense: int = 0
    """Modelled bytes of keys and values, unpruned."""
    flops_cached: Mapping[str, int] = field(default_factory=dict)
    """Modelled FLOPs of `flops` that caches spared."""
    images_cached: int = 0
    """Rows whose images an earlier row had encoded."""
    prefixes_cached: int = 0
    """Rows among them whose prompt an earlier row had read up to the question."""
    nanoseconds_by_device: Mapping[str, int] = field(default_factory=dict)
    """`nanoseconds` by the kind of device that spent them."""
    blocks: tuple[Block, ...] = ()
    """Control blocks that were measured, at most one a unit."""
    blocks_spoiled: int = 0
    """Control blocks that an online request or a dead replica spoiled."""
    ordinary_rows: Mapping[str, int] = field(default_factory=dict)
    """Answered rows that are in no block, by kind of device."""
    ordinary_nanoseconds: Mapping[str, int] = field(default_factory=dict)
    """Their `nanoseconds`."""
    steady_flops: int = 0
    """Modelled FLOPs of the rows that blocks measure by."""
    steady_flops_cached: int = 0
    """Those that caches spared of them."""
    control_nanoseconds: int = 0
    """What measuring cost: dense answers of control blocks, spoiled ones and warm-ups included."""
    retry_nanoseconds: int = 0
    """Spent on answers of rows that were asked again, as far as replicas lived to tell."""
    agreements: int = 0
    """Control rows whose pruned and dense texts are equal."""

    @property
    def rows_failed(self) -> int:
        """Error rows of all codes."""
        return sum(self.failed.values())

    @property
    def seconds(self) -> float:
        """Replica time of the rows as they ran, without the dense twins of control rows."""
        return self.nanoseconds / NANO

    @property
    def control_rows(self) -> int:
        """Rows that were answered both ways."""
        return sum(block.rows for block in self.blocks)

    @property
    def control_seconds(self) -> float:
        """`control_nanoseconds` in seconds."""
        return self.control_nanoseconds / NANO

    @property
    def retry_seconds(self) -> float:
        """`retry_nanoseconds` in seconds."""
        return self.retry_nanoseconds / NANO

    def __add__(self, other: UnitLedger) -> UnitLedger:
        return _sum([self, other])

    def to_json(self) -> str:
        """For the footer of a unit."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> UnitLedger:
        """The inverse of `to_json`. Raises ValueError or TypeError on anything else."""
        data = json.loads(text)
        blocks = [Block(*block) for block in data.pop("blocks", ())]
        if pairs := data.pop("control_pairs", ()):  # of schema version 2
            blocks = _batches(pairs)
            data["control_nanoseconds"] = sum(block.dense for block in blocks)
        return cls(**data, blocks=tuple(blocks))


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
        """The measured speed-up with its 95 % interval; None without control blocks."""
        return measured_ratio(self.total.blocks, seconds=self.total.nanoseconds_by_device)


def unit_ledger(table: pa.Table) -> UnitLedger:
    """The account of the rows of one unit, from these rows alone, in any order."""
    totals: Counter[str] = Counter()
    by_name: dict[str, Counter[str]] = {name: Counter() for name in _BY_PART}
    failed: Counter[str] = Counter()
    by_device: Counter[str] = Counter()
    ordinary, ordinary_time = Counter[str](), Counter[str]()
    paired = in_block = 0
    pruned, dense = list[float | None](), list[float | None]()
    device = ""
    for row in table.select(_COLUMNS).to_pylist():
        attempts = row["attempts"] or 0
        discarded = nanoseconds(row["discarded_seconds"] or 0.0)
        kind = "control_nanoseconds" if row["is_control"] else "retry_nanoseconds"
        totals.update({"attempts": attempts, "recomputed": int(attempts > 1), kind: discarded})
        in_block += bool(row["is_control"])
        if row["error_code"] is not None:
            failed[row["error_code"]] += 1
            continue
        totals.update({name: row[name] or 0 for name in _COUNTED})
        spent = nanoseconds(row["seconds"] or 0.0)
        totals.update(nanoseconds=spent)
        if row["device"] is not None:
            by_device[row["device"]] += spent
            if not row["is_control"]:
                ordinary[row["device"]] += 1
                ordinary_time[row["device"]] += spent
        if row["is_control"] and row["control_seconds"] is not None:
            twin = nanoseconds(row["control_seconds"])
            paired += 1
            pruned.append(row["steady_seconds"])
            dense.append(row["control_steady_seconds"])
            device = row["device"] or ""
            agrees = row["text"] == row["control_text"]
            totals.update(control_nanoseconds=twin, agreements=int(agrees))
        for name in _BY_PART:
            parts = row[name] or {}
            by_name[name].update({part: count for part, count in parts.items() if count})
        spared = row["flops_cached"] or {}
        totals.update(
            images_cached=int(bool(spared.get("vision"))),
            prefixes_cached=int(bool(spared.get("prefill"))),
        )
        if row["steady_seconds"] is not None:
            totals.update(
                steady_flops=sum(filter(None, (row["flops"] or {}).values())),
                steady_flops_cached=sum(filter(None, spared.values())),
            )
    blocks = Block.at_pace(pruned, dense, rows=paired, device=device)
    return UnitLedger(
        rows=table.num_rows,
        failed=dict(failed),
        nanoseconds_by_device=dict(by_device),
        ordinary_rows=dict(ordinary),
        ordinary_nanoseconds=dict(ordinary_time),
        blocks=tuple(blocks),
        blocks_spoiled=int(in_block > 0 and not blocks),
        flops=dict(by_name["flops"]),
        flops_dense=dict(by_name["flops_dense"]),
        flops_cached=dict(by_name["flops_cached"]),
        **totals,
    )


_BY_PART = ("flops", "flops_dense", "flops_cached")
_COUNTED = (
    "visual_tokens",
    "visual_tokens_kept",
    "prompt_tokens",
    "completion_tokens",
    "kv_bytes",
    "kv_bytes_dense",
)
_COLUMNS = (
    *_COUNTED,
    *_BY_PART,
    "error_code",
    "attempts",
    "seconds",
    "is_control",
    "control_seconds",
    "steady_seconds",
    "control_steady_seconds",
    "discarded_seconds",
    "device",
    "text",
    "control_text",
)


def _batches(pairs: Iterable[Sequence[int]]) -> list[Block]:
    """Control rows of schema version 2 as the batches they ran in: rows of one batch have equal
    (pruned, dense) nanoseconds."""
    return [
        Block(pruned * rows, dense * rows, rows)
        for (pruned, dense), rows in Counter(map(tuple, pairs)).items()
    ]


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
