"""The audit of an output: everything that a run says of itself, recomputed from its rows.

Each unit's ledger is summed anew from its rows and compared with its footer; the summary is
compared with these sums; rows are compared with the plan, the settings, themselves, and with the
digest of their bytes. What differs is named. Who forges rows, footer and summary together is not
found: an output does not say who wrote it, so keep it where only the run can write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import pyarrow as pa

from cluster.accounting.ledger import RunLedger, UnitLedger, unit_ledger
from cluster.config import SCHEMA_VERSION
from cluster.corpus.unit import Unit
from cluster.errors import ClusterError, CommitRefused, StoreError, UsageError
from cluster.output.checks import check_pruning_claims
from cluster.output.manifest import Manifest
from cluster.output.run_output import CommittedUnit, RunOutput
from cluster.output.summary import summarise
from sppruner.spec import PruneSpec

# Of a summary: what is not of the rows, but of the command that wrote it or of the moment.
_NOT_OF_ROWS: Final = frozenset({"attempt", "unavailable", "foreign_objects", "output"})
_RELATIVE: Final = 1e-9
_STEADY: Final = ("steady_seconds", "control_steady_seconds")
# Of an answered row.
_NEVER_NULL: Final = ("text", "seconds", "prompt_tokens", "completion_tokens", "kv_bytes", "flops")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as the run says."""

    where: str
    """The object, and the row where it is one row's."""
    what: str
    """What is said, and what is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was compared, and what differs."""

    units: int
    """Units read."""
    rows: int
    """Their rows."""
    differences: tuple[Difference, ...]
    """In the order of the units; those of the summary last."""


def audit(output: RunOutput) -> Audit:
    """Reads every committed unit of the run in an output. Raises UsageError for a prefix that holds
    no run, and for one of another schema version, whose rows hold something else; StoreError
    where the manifest cannot be read."""
    manifest = output.require_manifest()
    version = manifest.identity.settings.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{output.uri} was written in schema version {version}, whose rows do not hold what "
            f"this version adds up: only runs of version {SCHEMA_VERSION} can be audited"
        )
    differences: list[Difference] = []
    ledgers: list[UnitLedger] = []
    committed = output.committed_units()
    for unit in manifest.units:
        if unit.unit_id not in committed:
            differences.append(Difference(where=unit.unit_id, what="this unit is not committed"))
            continue
        try:
            found = output.open_unit(unit.unit_id)
            unchanged = output.has_written_rows(unit.unit_id)
            ledgers.append(unit_ledger(found.table))
        except (ClusterError, pa.ArrowException, KeyError, TypeError) as error:
            differences.append(Difference(where=unit.unit_id, what=str(error)))
            continue
        if not unchanged:
            what = "its rows are not the bytes that were written with its footer"
            differences.append(Difference(where=unit.unit_id, what=what))
        differences += _unit_differences(unit, found, ledgers[-1], manifest, output)
    differences += _run_differences(manifest, output, RunLedger.of(ledgers))
    return Audit(
        units=len(ledgers),
        rows=sum(ledger.rows for ledger in ledgers),
        differences=tuple(differences),
    )


def _unit_differences(
    unit: Unit, found: CommittedUnit, ledger: UnitLedger, manifest: Manifest, output: RunOutput
) -> Iterator[Difference]:
    told = found.footer.ledger
    for name, value in asdict(ledger).items():
        said = asdict(told)[name]
        if said != value:
            what = f"its footer says {name} {said}, its rows {value}"
            yield Difference(where=unit.unit_id, what=what)
    numbers = found.table["unit_row"].to_pylist()
    if sorted(numbers, key=str) != sorted(range(unit.row_count), key=str):
        what = f"{len(numbers)} rows, {len(set(numbers))} of them different, planned are "
        yield Difference(where=unit.unit_id, what=f"{what}{unit.row_count}")
    yield from _column_differences(unit, found.table, manifest)
    try:
        check_pruning_claims(found.table, unit.unit_id)
    except CommitRefused as error:
        yield Difference(where=unit.unit_id, what=str(error))
    yield from _row_differences(unit, found.table, _specs(manifest, output))


def _column_differences(unit: Unit, table: pa.Table, manifest: Manifest) -> Iterator[Difference]:
    """Columns that have one value in a whole run or unit."""
    settings = manifest.identity.settings
    same = {"run_id": manifest.run_id, "unit_id": unit.unit_id}
    same |= {name: settings[name] for name in ("model", "model_revision")}
    for name, value in same.items():
        others = set(table[name].to_pylist()) - {value}
        if others:
            yield Difference(where=unit.unit_id, what=f"rows have {name} {others}, not {value!r}")


def _row_differences(unit: Unit, table: pa.Table, specs: frozenset[str]) -> Iterator[Difference]:
    """Rows that no replica gives."""
    columns = [*_NEVER_NULL, "unit_row", "error_code", "prune_spec", "is_control"]
    columns += ["control_seconds", "control_text", *_STEADY]
    twins, steady = 0, set[str]()
    for row in table.select(columns).to_pylist():
        where = f"{unit.unit_id} row {row['unit_row']}"
        if row["error_code"] is not None:
            if row["text"] is not None:
                yield Difference(where=where, what="an error row with a text")
            continue
        missing = [name for name in _NEVER_NULL if row[name] is None]
        if missing:
            yield Difference(where=where, what=f"an answer without {', '.join(missing)}")
        if row["prune_spec"] not in specs:
            what = f"its spec {row['prune_spec']} is not the run's, {' or '.join(sorted(specs))}"
            yield Difference(where=where, what=what)
        if min(row[name] or 0.0 for name in ("seconds", "control_seconds", *_STEADY)) < 0:
            yield Difference(where=where, what="its seconds are negative")
        twin = row["control_seconds"] is not None
        paced = [name for name in _STEADY if row[name] is not None]
        twins += twin
        steady.update(paced)
        incomplete = twin != (row["control_text"] is not None)
        if incomplete or ((twin or paced) and not (twin and row["is_control"])):
            yield Difference(
                where=where, what="its dense twin is incomplete, or it has none to have"
            )
    if twins and steady != set(_STEADY):
        lacking = ", ".join(name for name in _STEADY if name not in steady)
        yield Difference(where=unit.unit_id, what=f"no row of its block has {lacking}")


def _specs(manifest: Manifest, output: RunOutput) -> frozenset[str]:
    """The spec that the rows of a run have: its own, or the one that it decided for."""
    spec = PruneSpec.from_dict(manifest.identity.settings["spec"])
    decision = output.break_even() if manifest.identity.settings.get("auto") else None
    spec = spec if decision is None else decision.spec(spec)
    return frozenset({spec.to_json()})


def _run_differences(
    manifest: Manifest, output: RunOutput, ledger: RunLedger
) -> Iterator[Difference]:
    """Of the summary, and of what stands beside the units."""
    for address in output.foreign_objects({unit.unit_id for unit in manifest.units}):
        yield Difference(where=address, what="no unit of this run, and readers take it for one")
    stored = output.summary()
    if stored is None:
        yield Difference(where="_run/summary.json", what="no summary is written")
        return
    try:
        told = json.loads(stored)
    except ValueError as error:
        yield Difference(where="_run/summary.json", what=f"not JSON: {error}")
        return
    try:
        summary = summarise(output)
    except StoreError as error:  # a unit that is named above
        yield Difference(where="_run/summary.json", what=f"cannot be made anew: {error}")
        return
    # What the footers say was compared with the rows: the totals are those of the rows themselves.
    of_rows = replace(summary, total=ledger.total, measured=ledger.measured_ratio())
    true = json.loads(of_rows.to_json())
    told = told if isinstance(told, dict) else {}
    yield from _compare("_run/summary.json", told, true)


def _compare(where: str, told: Mapping[str, Any], true: Mapping[str, Any]) -> Iterator[Difference]:
    for path, said, value in _pairs(told, true, ()):
        if path[0] in _NOT_OF_ROWS or _equal(said, value):
            continue
        yield Difference(where=where, what=f"it says {'.'.join(path)} {said!r}, found is {value!r}")


def _pairs(
    told: Any, true: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(told, dict) and isinstance(true, dict):
        for name in sorted(told.keys() | true.keys()):
            yield from _pairs(told.get(name), true.get(name), (*path, name))
    else:
        yield path, told, true


def _equal(said: Any, value: Any) -> bool:
    if isinstance(said, float) and isinstance(value, float):
        return abs(said - value) <= _RELATIVE * max(abs(said), abs(value))
    return bool(said == value)
