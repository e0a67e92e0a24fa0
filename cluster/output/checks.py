"""The audit before a commit: whole units only, of this run, and rows that saw what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import pyarrow as pa

from cluster.config import Kind
from cluster.errors import CommitRefused
from cluster.runs.planning import Plan
from sppruner.errors import SpecError
from sppruner.spec import PruneSpec

_SEEN: Final = ("visual_tokens", "visual_tokens_kept", "kept_tokens")
_PROOF: Final = ["unit_row", "text", "error_code", *_SEEN, "prune_method", "prune_spec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedUnits:
    """What a unit is checked against. rows: planned rows by unit id."""

    run_id: str
    kind: Kind
    source_schema: pa.Schema
    rows: Mapping[str, int]

    @classmethod
    def of(cls, plan: Plan) -> ExpectedUnits:
        return cls(
            run_id=plan.run_id,
            kind=plan.kind,
            source_schema=plan.source_schema,
            rows={unit.unit_id: unit.row_count for unit in plan.units},
        )


def check_complete(table: pa.Table, terms: ExpectedUnits) -> str:
    """The unit whose rows these are, exactly its planned ones, of this run.

    Raises CommitRefused.
    """
    units = set(table["unit_id"].to_pylist())
    if len(units) != 1 or None in units:
        raise CommitRefused(f"rows of the units {sorted(map(str, units))} in one commit")
    unit_id: str = units.pop()
    planned = terms.rows.get(unit_id)
    if planned is None:
        raise CommitRefused(f"unit {unit_id} is not planned in run {terms.run_id}")
    rows = table["unit_row"].to_pylist()
    if sorted(rows, key=lambda row: -1 if row is None else row) != list(range(planned)):
        raise CommitRefused(
            f"unit {unit_id} has {len(rows)} rows, {len(set(rows))} of them different, where "
            f"exactly its {planned} planned rows belong"
        )
    runs = set(table["run_id"].to_pylist())
    if runs != {terms.run_id}:
        raise CommitRefused(f"unit {unit_id} has rows of other runs than {terms.run_id}: {runs}")
    return unit_id


def check_pruning_claims(table: pa.Table, unit_id: str) -> None:
    """Every row is an answer or an error, and an answer saw the tokens its spec allows.

    Raises CommitRefused.
    """
    for row in table.select(_PROOF).to_pylist():
        if row["error_code"] is not None:
            continue
        where = f"unit {unit_id} row {row['unit_row']}"
        if row["text"] is None:
            raise CommitRefused(f"{where} has neither a text nor an error")
        seen, kept, mask = (row[name] for name in _SEEN)
        if None in (seen, kept, mask, row["prune_spec"]):
            raise CommitRefused(f"{where} does not say which visual tokens the model saw")
        try:
            spec = _spec(row["prune_spec"])
        except (ValueError, SpecError) as error:
            raise CommitRefused(f"{where}: {error}") from error
        if spec.method != row["prune_method"]:
            raise CommitRefused(f"{where} names method {row['prune_method']} beside {spec.method}")
        fewest, most = spec.budget.bounds(seen)
        if not fewest <= kept <= most:
            raise CommitRefused(
                f"{where} kept {kept} of {seen} visual tokens where {spec.method} with its budget "
                f"keeps {_range(fewest, most)}: pruning did not do what the row says"
            )
        _check_mask(mask, seen, kept, spec, where)


def _check_mask(mask: bytes, seen: int, kept: int, spec: PruneSpec, where: str) -> None:
    """The mask has a bit for each token, and marks as many as the method lets enter the decoder:
    `kept`, or more where it drops some of them there."""
    bits = int.from_bytes(mask, "little")
    if len(mask) != -(-seen // 8) or bits.bit_length() > seen:
        raise CommitRefused(f"{where}: {len(mask)} bytes of kept_tokens do not fit {seen} tokens")
    entered = bits.bit_count()
    if entered == kept:
        return  # Asking a method loads torch, which a sink has no other use for.
    try:
        fewest, most = _entering(spec, seen, kept)
    except SpecError as error:
        raise CommitRefused(f"{where}: {error}") from error
    if not fewest <= entered <= most:
        raise CommitRefused(
            f"{where} kept {kept} visual tokens by its count and {entered} by its kept_tokens, "
            f"where {spec.method} lets {_range(fewest, most)} of {seen} enter the decoder: one of "
            "them does not say what the model saw"
        )


@lru_cache(maxsize=256)
def _spec(text: str) -> PruneSpec:
    return PruneSpec.from_dict(json.loads(text))


def _entering(spec: PruneSpec, seen: int, kept: int) -> tuple[int, int]:
    """Fewest and most of `seen` tokens that enter the decoder where `kept` count."""
    from sppruner.selectors import selector_for

    selector = selector_for(spec)
    return (kept, kept) if selector is None else selector.decoder_entry_bounds(seen, kept)


def _range(fewest: int, most: int) -> str:
    return str(most) if fewest == most else f"{fewest} to {most}"
