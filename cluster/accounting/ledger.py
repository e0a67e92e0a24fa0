"""What committed rows cost and saved. Computed once per unit and kept in its Parquet footer.

Sums are over integers (durations in nanoseconds), so that adding ledgers in any order and
grouping gives the same total. Modelled figures (FLOPs, KV bytes) and measured ones (seconds) are
never mixed, and a saving may be negative.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import StoreError
from cluster.runs.planning import unit_key
from cluster.schema import COST_FIELD
from cluster.store import ObjectInfo, RangedFile, Store

LEDGER_KEY = "sppruner.ledger"
RESAMPLES = 2_000
_THREADS = 16
_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitLedger:
    """The account of some committed rows: of one unit, or the sum of several.

    rows counts every row, failed those with an error, by code. recomputed: rows that took more
    than one attempt; attempts: all attempts of all rows. Tokens, nanoseconds, FLOPs (by part) and
    KV bytes are of the rows that succeeded, as they ran; *_dense of the same rows unpruned.
    control_pairs: (pruned, dense) nanoseconds of each control row; agreements: how many of
    those rows gave the same text both ways. The dense twins' time is in the pairs alone.
    """

    rows: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    attempts: int = 0
    recomputed: int = 0
    visual_tokens: int = 0
    visual_tokens_kept: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nanoseconds: int = 0
    flops: Mapping[str, int] = field(default_factory=dict)
    flops_dense: Mapping[str, int] = field(default_factory=dict)
    kv_bytes: int = 0
    kv_bytes_dense: int = 0
    control_pairs: tuple[tuple[int, int], ...] = ()
    agreements: int = 0

    @property
    def rows_failed(self) -> int:
        return sum(self.failed.values())

    @property
    def seconds(self) -> float:
        """Measured seconds of the rows as they ran, without the dense twins of control rows."""
        return self.nanoseconds / _NANO

    @property
    def control_rows(self) -> int:
        return len(self.control_pairs)

    @property
    def control_seconds(self) -> float:
        """Measured seconds spent on dense twins, the price of measuring."""
        return sum(dense for _, dense in self.control_pairs) / _NANO

    @property
    def flops_saved(self) -> int:
        """Modelled; negative where pruning cost more than it saved."""
        return sum(self.flops_dense.values()) - sum(self.flops.values())

    def __add__(self, other: UnitLedger) -> UnitLedger:
        return _sum([self, other])

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> UnitLedger:
        """The inverse of `to_json`. Raises ValueError or TypeError on anything else."""
        data = json.loads(text)
        pairs = tuple((pruned, dense) for pruned, dense in data.pop("control_pairs", ()))
        return cls(**data, control_pairs=pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRatio:
    """Dense over pruned seconds of the same rows: above 1 pruning was faster.

    rows: control rows behind it, which ran in `batches` batches. A row's seconds are its batch's,
    divided: the interval therefore resamples batches, and is None below two of them.
    """

    ratio: float
    low: float | None
    high: float | None
    rows: int
    batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLedger:
    """The sum over a run's committed units."""

    units: int = 0
    total: UnitLedger = field(default_factory=UnitLedger)

    @classmethod
    def of(cls, ledgers: Iterable[UnitLedger]) -> RunLedger:
        ledgers = list(ledgers)
        return cls(units=len(ledgers), total=_sum(ledgers))

    def __add__(self, other: RunLedger) -> RunLedger:
        return RunLedger(units=self.units + other.units, total=self.total + other.total)

    def measured_ratio(self, *, seed: int = 0) -> MeasuredRatio | None:
        """The measured speed-up with its 95 % bootstrap interval; None without control rows."""
        return measured_ratio(self.total.control_pairs, seed)


def unit_ledger(table: pa.Table) -> UnitLedger:
    """The account of an output table, which still has its `_out_cost`."""
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


def read_ledgers(store: Store, unit_ids: Iterable[str]) -> list[UnitLedger]:
    """The ledgers of committed units, in the order given, from their footers alone.

    Raises StoreError where a unit is not there or carries no ledger.
    """
    wanted = [unit_key(unit_id) for unit_id in unit_ids]
    # One listing tells the sizes of a thousand units; for a few, asking for each is quicker.
    many = len(wanted) > _THREADS
    listed = {info.key: info for info in store.list(suffixes=(".parquet",))} if many else {}

    def read(key: str) -> UnitLedger:
        info = listed.get(key) if many else store.head(key)
        if info is None:
            raise StoreError(f"{store.uri_of(key)}: this unit is not committed")
        return _footer_ledger(store, info)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, wanted))


def _footer_ledger(store: Store, info: ObjectInfo) -> UnitLedger:
    uri = store.uri_of(info.key)
    try:
        metadata = pq.read_metadata(RangedFile(store, info)).metadata or {}
    except pa.ArrowException as error:
        raise StoreError(f"{uri}: not a Parquet file ({error}); remove it and resume") from error
    ledger = metadata.get(LEDGER_KEY.encode())
    if ledger is None:
        raise StoreError(f"{uri}: no ledger in its footer; it is not a unit of a run")
    return UnitLedger.from_json(ledger)


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


def nanoseconds(seconds: float) -> int:
    """Seconds as ledgers add them up."""
    return round(seconds * _NANO)


def measured_ratio(pairs: Sequence[tuple[int, int]], seed: int = 0) -> MeasuredRatio | None:
    """The ratio of control rows, given each row's pruned and dense nanoseconds; None without."""
    if not pairs or not sum(pruned for pruned, _ in pairs):
        return None
    # Rows of one batch share their seconds to the nanosecond: equal pairs are one observation.
    # Sorted by np.unique, the result does not depend on the order in which units were added.
    batches, rows = np.unique(np.array(pairs, dtype=np.int64), axis=0, return_counts=True)
    seconds = batches * rows[:, None] / _NANO
    low = high = None
    if len(seconds) > 1:
        generator = np.random.default_rng(seed)
        ratios = np.empty(RESAMPLES)
        for number in range(RESAMPLES):
            drawn = seconds[generator.integers(0, len(seconds), len(seconds))].sum(axis=0)
            ratios[number] = drawn[1] / drawn[0]
        low, high = (float(bound) for bound in np.percentile(ratios, [2.5, 97.5]))
    pruned, dense = seconds.sum(axis=0)
    return MeasuredRatio(
        ratio=float(dense / pruned), low=low, high=high, rows=len(pairs), batches=len(seconds)
    )
