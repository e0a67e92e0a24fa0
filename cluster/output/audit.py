"""The audit of an output: everything that a run says of itself, recomputed from its rows.

Each unit's ledger is summed anew from its rows and compared with its footer; the summary is
compared with these sums; rows are compared with the plan, the settings, themselves, and with the
digest of their bytes; the plan with what its units cover; a decision with its evidence. What
differs is named, and whatever cannot be read is a difference too. Who forges rows, footer and
summary together is not found: an output does not say who wrote it, so keep it where only the run
can write.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Final

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.ledger import RunLedger, UnitLedger, unit_ledger
from cluster.config import SCHEMA_VERSION
from cluster.corpus.unit import Unit, join_units, make_unit
from cluster.errors import UsageError
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.output.summary import summarise
from cluster.output.unit_audit import Difference, RunClaims, unit_differences
from sppruner.spec import PruneSpec

# Of a summary: what is not of the rows, but of the command that wrote it or of the moment.
_NOT_OF_ROWS: Final = frozenset(
    {"attempt", "not_measured", "unavailable", "foreign_objects", "output"}
)
# Parts of a summary that may be unavailable, by the names of their reasons.
_PARTS: Final = {
    "keys": "duplicate_keys",
    "dtype": "dtype",
    "accuracy": "accuracy",
    "break-even": "break_even",
}
_SUMMARY: Final = "_run/summary.json"
_RELATIVE: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was compared, and what differs."""

    units: int
    """Units read."""
    rows: int
    """Their rows."""
    differences: tuple[Difference, ...]
    """In the order of the units; those of the summary last."""
    open: int = 0
    """Units that are not committed, and that the run does not claim: it has not ended."""


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
    committed = output.committed_units()
    missing = [unit.unit_id for unit in manifest.units if unit.unit_id not in committed]
    told = _told(output)
    differences = [*_plan_differences(manifest.units)]
    specs: frozenset[str] | None = None
    try:
        decision = output.break_even() if manifest.identity.settings.get("auto") else None
        differences += _decision_differences(decision)
        specs = _specs(manifest, decision)
    except Exception as error:  # of whatever was written there
        differences.append(_unreadable("_run/break-even.json", error))
    done = len(manifest.units) - len(missing)
    said = told.get("units_done") if isinstance(told, dict) else None
    claimed = isinstance(said, int) and said > done
    # A run that goes on, or was stopped, has the summary of the attempt before.
    earlier = bool(missing) and isinstance(said, int) and said < done
    if claimed:
        what = "this unit is not committed"
        differences += [Difference(where=unit_id, what=what) for unit_id in missing]
    run = RunClaims.of(manifest, specs)
    ledgers: list[UnitLedger] = []
    for unit in manifest.units:
        if unit.unit_id not in committed:
            continue
        try:
            found = output.open_unit(unit.unit_id)
            unchanged = output.has_written_rows(unit.unit_id)
            ledgers.append(unit_ledger(found.table))
            if not unchanged:
                what = "its rows are not the bytes that were written with its footer"
                differences.append(Difference(where=unit.unit_id, what=what))
            differences += unit_differences(unit, found, ledgers[-1], run)
        except Exception as error:  # of whatever was written there
            differences.append(_unreadable(unit.unit_id, error))
    told = None if earlier else told
    differences += _run_differences(manifest, output, told, RunLedger.of(ledgers), missing)
    return Audit(
        units=len(ledgers),
        rows=sum(ledger.rows for ledger in ledgers),
        differences=tuple(differences),
        open=0 if claimed else len(missing),
    )


def _unreadable(where: str, error: Exception) -> Difference:
    return Difference(where=where, what=f"cannot be read: {error or type(error).__name__}")


def _plan_differences(units: Iterable[Unit]) -> Iterator[Difference]:
    """Units that are not what their ids are hashes of, that are there twice, or that leave out rows
    of a file before its last unit."""
    seen: set[str] = set()
    covered: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for unit in units:
        made = join_units([_made(piece) for piece in unit.pieces])
        if made.unit_id != unit.unit_id:
            yield Difference(where=unit.unit_id, what=f"the plan of unit {made.unit_id}")
        if unit.unit_id in seen:
            yield Difference(where=unit.unit_id, what="planned twice")
        seen.add(unit.unit_id)
        for piece in unit.pieces:
            covered[piece.file].append((piece.row_start, piece.row_count))
    for file, pieces in covered.items():
        row = 0
        for start, count in sorted(pieces):
            if start != row:
                what = f"the plan goes on at row {start} after {row} rows"
                yield Difference(where=file, what=what)
            row = start + count


def _made(piece: Unit) -> Unit:
    """The piece, with the id that follows from what it covers."""
    position = piece.to_dict()
    for name in ("unit_id", "format", "file", "file_size", "etag"):
        del position[name]
    return make_unit(piece.format, piece.info, **position)


def _decision_differences(decision: BreakEven | None) -> Iterator[Difference]:
    """Of the decision whether pruning pays, and the blocks that it rests on."""
    if decision is None:
        return
    made = BreakEven.from_blocks(decision.evidence)
    said, found = ({"measured": one.to_dict()["measured"]} for one in (decision, made))
    yield from _compare("_run/break-even.json", said, found)


def _specs(manifest: Manifest, decision: BreakEven | None) -> frozenset[str]:
    """The spec that the rows of a run have: its own, or the one that it decided for."""
    spec = PruneSpec.from_dict(manifest.identity.settings["spec"])
    return frozenset({(spec if decision is None else decision.spec(spec)).to_json()})


def _told(output: RunOutput) -> Any:
    """What the summary holds; None without one, the error for what cannot be read."""
    try:
        stored = output.summary()
        return None if stored is None else json.loads(stored)
    except Exception as error:  # of whatever was written there
        return error


def _run_differences(
    manifest: Manifest, output: RunOutput, told: Any, ledger: RunLedger, missing: list[str]
) -> Iterator[Difference]:
    """Of the summary, and of what stands beside the units."""
    for address in output.foreign_objects({unit.unit_id for unit in manifest.units}):
        yield Difference(where=address, what="no unit of this run, and readers take it for one")
    if told is None:
        if not missing:  # a run that was stopped has none
            yield Difference(where=_SUMMARY, what="no summary is written")
        return
    if isinstance(told, Exception):
        yield _unreadable(_SUMMARY, told)
        return
    if not isinstance(told, dict):
        yield Difference(where=_SUMMARY, what="it is no object")
        return
    try:
        summary = summarise(output)
    except Exception as error:  # of a unit that is named above
        yield Difference(where=_SUMMARY, what=f"cannot be made anew: {error}")
        return
    # What the footers say was compared with the rows: the totals are those of the rows themselves.
    of_rows = replace(summary, total=ledger.total, measured=ledger.measured_ratio())
    true = json.loads(of_rows.to_json())
    reasons = told.get("unavailable")
    unknown: set[str] = set()
    for part, field in _PARTS.items():
        if told.get(field) is not None and part in summary.unavailable:
            unknown.add(field)
            what = f"it says {field}, which cannot be made anew: {summary.unavailable[part]}"
            yield Difference(where=_SUMMARY, what=what)
        elif told.get(field) is None and isinstance(reasons, dict) and part in reasons:
            unknown.add(field)
    yield from _compare(_SUMMARY, told, true, _NOT_OF_ROWS | unknown)


def _compare(
    where: str, told: Mapping[str, Any], true: Mapping[str, Any], but: Set[str] = frozenset()
) -> Iterator[Difference]:
    for path, said, value in _pairs(told, true, ()):
        if path[0] in but or _equal(said, value):
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
