"""What the audit finds in one unit: rows against footer, plan, settings and themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from typing import Any, Final

import pyarrow as pa

from cluster.accounting.ledger import UnitLedger
from cluster.config import Kind
from cluster.corpus.unit import Unit
from cluster.errors import CommitRefused
from cluster.output.checks import check_pruning_claims
from cluster.output.manifest import Manifest
from cluster.output.run_output import CommittedUnit
from sppruner.spec import DENSE

_STEADY: Final = ("steady_seconds", "control_steady_seconds")
_SECONDS: Final = ("seconds", "control_seconds", "discarded_seconds", *_STEADY)
_FLOPS: Final = ("flops", "flops_dense", "flops_cached")
# Of an answered row.
_NEVER_NULL: Final = ("text", "seconds", "prompt_tokens", "completion_tokens", "kv_bytes", "flops")
_COLUMNS: Final = (
    *_NEVER_NULL,
    *_SECONDS,
    *("unit_row", "error_code", "prune_spec", "prune_method", "is_control", "control_text"),
    *("kv_bytes_dense", "flops_dense", "flops_cached"),
)
# The steady part is within its arm: clocks of calls and answers differ by so much.
_CLOCKS: Final = 1.05
_CLOCK_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as the run says."""

    where: str
    """The object, and the row where it is one row's."""
    what: str
    """What is said, and what is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunClaims:
    """What a run says of all its units."""

    same: Mapping[str, str]
    """Columns that have one value in all rows."""
    plan: str
    """See `Manifest.plan`."""
    kind: Kind
    """caption or vqa."""
    specs: frozenset[str] | None
    """That rows may have; None where that is not known."""

    @classmethod
    def of(cls, manifest: Manifest, specs: frozenset[str] | None) -> RunClaims:
        """What a manifest says; digests of a plan of many units are made once."""
        same = {name: manifest.identity.settings[name] for name in ("model", "model_revision")}
        same["run_id"] = manifest.run_id
        return cls(same=same, plan=manifest.plan, kind=manifest.kind, specs=specs)


def unit_differences(
    unit: Unit, found: CommittedUnit, ledger: UnitLedger, run: RunClaims
) -> Iterator[Difference]:
    """What differs in a committed unit. ledger: of its rows."""
    told = asdict(found.footer.ledger)
    for name, value in asdict(ledger).items():
        if told[name] != value:
            what = f"its footer says {name} {told[name]}, its rows {value}"
            yield Difference(where=unit.unit_id, what=what)
    numbers = found.table["unit_row"].to_pylist()
    if sorted(numbers, key=str) != sorted(range(unit.row_count), key=str):
        what = f"{len(numbers)} rows, {len(set(numbers))} of them different, planned are "
        yield Difference(where=unit.unit_id, what=f"{what}{unit.row_count}")
    if found.footer.plan != run.plan:
        yield Difference(where=unit.unit_id, what="it was committed in a plan of other units")
    yield from _column_differences(unit, found.table, run)
    try:
        check_pruning_claims(found.table, unit.unit_id)
    except CommitRefused as error:
        yield Difference(where=unit.unit_id, what=str(error))
    rows = found.table.select(list(_COLUMNS)).to_pylist()
    for row in rows:
        for what in _row_differences(row, run.specs):
            yield Difference(where=f"{unit.unit_id} row {row['unit_row']}", what=what)
    for what in _block_differences(rows, mended=bool(found.footer.retries)):
        yield Difference(where=unit.unit_id, what=what)


def _column_differences(unit: Unit, table: pa.Table, run: RunClaims) -> Iterator[Difference]:
    """Columns that have one value in a whole run or unit, or that of another column."""
    for name, value in (*run.same.items(), ("unit_id", unit.unit_id)):
        others = set(table[name].to_pylist()) - {value}
        if others:
            yield Difference(where=unit.unit_id, what=f"rows have {name} {others}, not {value!r}")
    if run.kind == "vqa" and table["answer"].to_pylist() != table["text"].to_pylist():
        yield Difference(where=unit.unit_id, what="rows have an answer that is not their text")


def _row_differences(row: Mapping[str, Any], specs: frozenset[str] | None) -> Iterator[str]:
    """What no replica gives."""
    seconds = [row[name] for name in _SECONDS if row[name] is not None]
    if not all(math.isfinite(value) for value in seconds):
        yield "its seconds are not finite"
    if min(seconds, default=0.0) < 0:
        yield "its seconds are negative"
    if row["error_code"] is not None:
        if row["text"] is not None:
            yield "an error row with a text"
        return
    missing = [name for name in _NEVER_NULL if row[name] is None]
    if missing:
        yield f"an answer without {', '.join(missing)}"
    if specs is not None and row["prune_spec"] not in specs:
        yield f"its spec {row['prune_spec']} is not the run's, {' or '.join(sorted(specs))}"
    flops, dense, cached = (row[name] or {} for name in _FLOPS)
    if any((count or 0) > (flops.get(part) or 0) for part, count in cached.items()):
        yield "caches spared more FLOPs than it has"
    as_run, unpruned = (flops, row["kv_bytes"]), (dense, row["kv_bytes_dense"])
    if row["prune_method"] == DENSE.method and as_run != unpruned:
        yield "a dense row whose dense cost is another"
    twin = row["control_seconds"] is not None
    paced = any(row[name] is not None for name in _STEADY)
    incomplete = twin != (row["control_text"] is not None)
    if incomplete or ((twin or paced) and not (twin and row["is_control"])):
        yield "its dense twin is incomplete, or it has none to have"


def _block_differences(rows: Sequence[Mapping[str, Any]], *, mended: bool) -> Iterator[str]:
    """What no control block is: at most one of a unit, of rows one after the other, half of which
    were answered both ways, within the time that they took. mended: failed rows were asked again;
    one that could not be sent with the block may be an answer by now."""
    ordered = sorted(rows, key=lambda row: row["unit_row"] or 0)
    places = [place for place, row in enumerate(ordered) if row["is_control"]]
    if not places:
        return
    block = ordered[places[0] : places[-1] + 1]
    if not mended and any(not row["is_control"] and row["error_code"] is None for row in block):
        yield "its block is not of rows one after the other"
    block = [row for row in block if row["is_control"]]
    twins = [row for row in block if row["control_seconds"] is not None]
    if not twins:
        return
    if 2 * len(twins) < len(block):
        yield f"{len(twins)} of the {len(block)} rows of its block were answered both ways"
    for name, arm in zip(_STEADY, ("seconds", "control_seconds"), strict=True):
        steady = [row[name] for row in twins if row[name] is not None]
        if not steady:
            yield f"no row of its block has {name}"
        whole = fsum(row[arm] or 0.0 for row in twins)
        # Failed rows have no seconds: the others' are then not the whole arm.
        if len(twins) == len(block) and fsum(steady) > whole * _CLOCKS + _CLOCK_SECONDS:
            yield f"the {name} of its block are {fsum(steady):.3f}, of {whole:.3f} in all"
