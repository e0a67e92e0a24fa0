"""What a run did, from its committed units alone: the same for a fresh run, a resumed one, and
one that somebody looks at a year later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.accounting.breakeven import BreakEven, read_break_even
from cluster.accounting.ledger import MeasuredRatio, RunLedger, UnitLedger, read_ledgers
from cluster.errors import UsageError
from cluster.output.accuracy import Accuracy, measure, reference_column
from cluster.output.manifest import Manifest, read_manifest
from cluster.runs.planning import done_units, unit_key
from cluster.store import RangedFile, Store, open_store

SUMMARY_KEY = "_run/summary.json"

# Above this many rows keys are not compared: the set of them would not fit a driver's memory.
_KEYS_COMPARED = 5_000_000
_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """How one invocation of a command went; the only part of a summary that is not in the store.

    replica_busy_share: share of the replicas' time in which an engine was working, from the first
    read to the last commit, the start of the calling actors included.
    """

    rows: int
    wall_seconds: float
    start_seconds: float
    rows_per_second: float
    replicas: int
    replica_busy_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run as of now. Modelled figures come from the model's config, measured ones from clocks;
    `measured` is None until a control row is committed. accuracy: VQA with references only.
    duplicate_keys: rows whose key another row has too; None where there are too many to compare.
    break_even: what a run that may choose chose, once it has.
    """

    run_id: str
    created: str
    settings: Mapping[str, Any]
    input: str
    output: str
    units: int
    units_done: int
    rows_planned: int
    total: UnitLedger
    measured: MeasuredRatio | None
    duplicate_keys: int | None
    accuracy: Accuracy | None
    attempt: Attempt | None = None
    break_even: BreakEven | None = None

    @property
    def state(self) -> str:
        if self.units_done < self.units:
            return "incomplete"
        return "completed_with_errors" if self.total.rows_failed else "completed"

    def to_dict(self) -> dict[str, Any]:
        total = self.total
        modelled = {
            "flops": dict(total.flops),
            "flops_dense": dict(total.flops_dense),
            "kv_bytes": total.kv_bytes,
            "kv_bytes_dense": total.kv_bytes_dense,
        }
        measured = {
            "seconds": total.seconds,
            "control_rows": total.control_rows,
            "control_agreements": total.agreements,
            "control_dense_seconds": total.control_seconds,
            "dense_over_pruned": None if self.measured is None else asdict(self.measured),
        }
        return {
            "run_id": self.run_id,
            "state": self.state,
            "created": self.created,
            "input": self.input,
            "output": self.output,
            "settings": dict(self.settings),
            "units": self.units,
            "units_done": self.units_done,
            "rows_planned": self.rows_planned,
            "rows": total.rows,
            "rows_failed": dict(total.failed),
            "rows_recomputed": total.recomputed,
            "duplicate_keys": self.duplicate_keys,
            "visual_tokens": total.visual_tokens,
            "visual_tokens_kept": total.visual_tokens_kept,
            "prompt_tokens": total.prompt_tokens,
            "completion_tokens": total.completion_tokens,
            "modelled": modelled,
            "measured": measured,
            "break_even": None if self.break_even is None else self.break_even.to_dict(),
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "attempt": None if self.attempt is None else asdict(self.attempt),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)


def summarise(output: str, attempt: Attempt | None = None) -> Summary:
    """Reads the summary of the run whose output this is. Raises UsageError if it is none."""
    store = open_store(output)
    manifest = read_manifest(store)
    if manifest is None:
        raise UsageError(f"{output} holds no run (no _run/manifest.json): give a job's --output")
    done = done_units(store) & {unit.unit_id for unit in manifest.units}
    ledger = RunLedger.of(read_ledgers(store, sorted(done)))
    columns = _columns(store, manifest, done)
    return Summary(
        run_id=manifest.run_id,
        created=manifest.created,
        settings=manifest.identity.settings,
        input=manifest.source,
        output=store.uri,
        units=len(manifest.units),
        units_done=len(done),
        rows_planned=sum(unit.row_count for unit in manifest.units),
        total=ledger.total,
        measured=ledger.measured_ratio(),
        duplicate_keys=_duplicates(columns),
        accuracy=_accuracy(columns),
        attempt=attempt,
        break_even=read_break_even(store),
    )


def _columns(store: Store, manifest: Manifest, done: set[str]) -> pa.Table | None:
    """Keys and, for VQA, answers and references of the committed rows."""
    rows = sum(unit.row_count for unit in manifest.units if unit.unit_id in done)
    if not done or rows > _KEYS_COMPARED:
        return None
    wanted = ["key"]
    references = reference_column(manifest.layout.schema)
    if manifest.identity.settings["kind"] == "vqa" and references is not None:
        wanted += ["answer", references]
    listed = {info.key: info for info in store.list(suffixes=(".parquet",))}

    def read(unit_id: str) -> pa.Table:
        return pq.read_table(RangedFile(store, listed[unit_key(unit_id)]), columns=wanted)

    with ThreadPoolExecutor(_THREADS) as pool:
        return pa.concat_tables(pool.map(read, sorted(done))).select(wanted)


def _duplicates(columns: pa.Table | None) -> int | None:
    if columns is None:
        return None
    counts = pc.value_counts(columns["key"].combine_chunks()).field("counts")
    return int(pc.sum(pc.if_else(pc.greater(counts, 1), counts, 0)).as_py() or 0)


def _accuracy(columns: pa.Table | None) -> Accuracy | None:
    if columns is None or columns.num_columns < 3:
        return None
    return measure(columns[1].to_pylist(), columns[2].to_pylist())


__all__ = ["SUMMARY_KEY", "Attempt", "Summary", "summarise"]
