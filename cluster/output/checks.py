"""Checks before a commit: complete units of this run, values of the planned types, and rows whose
pruning claims hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import pyarrow as pa

from cluster.config import Kind
from cluster.errors import CommitRefused
from cluster.output.manifest import Manifest
from cluster.schema import PLANNED_FIELD
from sppruner.errors import SpecError
from sppruner.spec import PruneSpec

_TOKENS: Final = ("visual_tokens", "visual_tokens_kept", "kept_tokens")
_CLAIMS: Final = ["unit_row", "text", "error_code", *_TOKENS, "prune_method", "prune_spec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedUnits:
    """What the units of a run are checked against."""

    run_id: str
    """The run."""
    kind: Kind
    """caption or vqa: decides the output columns."""
    source_schema: pa.Schema
    """The committed source columns."""
    plan: str | None = None
    """See `Manifest.plan`; None where it is not known."""

    @classmethod
    def of(cls, manifest: Manifest) -> ExpectedUnits:
        """What a run's manifest plans."""
        return cls(
            run_id=manifest.run_id,
            kind=manifest.kind,
            source_schema=manifest.mapping.schema,
            plan=manifest.plan,
        )


def check_complete(table: pa.Table, expected: ExpectedUnits) -> str:
    """The id of the unit whose rows these are. Raises CommitRefused unless the table holds exactly
    the planned rows of one unit of this run. How many these are has come with the rows."""
    units = set(table["unit_id"].to_pylist())
    if len(units) != 1 or None in units:
        raise CommitRefused(f"rows of the units {sorted(map(str, units))} in one commit")
    unit_id: str = units.pop()
    planned = _planned_rows(table)
    rows = table["unit_row"].to_pylist()
    if sorted(rows, key=lambda row: -1 if row is None else row) != list(range(planned)):
        raise CommitRefused(
            f"unit {unit_id} has {len(rows)} rows, {len(set(rows))} of them different, where "
            f"exactly its {planned} planned rows belong"
        )
    runs = set(table["run_id"].to_pylist())
    if runs != {expected.run_id}:
        raise CommitRefused(f"unit {unit_id} has rows of other runs than {expected.run_id}: {runs}")
    return unit_id


def check_types(table: pa.Table, schema: pa.Schema, unit_id: str) -> pa.Table:
    """The columns of `schema`, in its types. Raises CommitRefused where a column has a value that
    is none of its type, or none where one is required."""
    columns = []
    for field in schema:
        try:
            columns.append(table[field.name].cast(field.type))
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            message = f"unit {unit_id}: column {field.name!r} cannot be committed: {reason}"
            raise CommitRefused(message[:500]) from error
    return pa.Table.from_arrays(columns, schema=schema)


def check_pruning_claims(table: pa.Table, unit_id: str) -> None:
    """Raises CommitRefused unless every row is an answer or an error, and every answer kept the
    tokens that its spec allows."""
    for row in table.select(_CLAIMS).to_pylist():
        if row["error_code"] is not None:
            continue
        where = f"unit {unit_id} row {row['unit_row']}"
        if row["text"] is None:
            raise CommitRefused(f"{where} has neither a text nor an error")
        total, kept, mask = (row[name] for name in _TOKENS)
        if None in (total, kept, mask, row["prune_spec"]):
            raise CommitRefused(f"{where} does not say which visual tokens the model saw")
        try:
            spec = _spec(row["prune_spec"])
        except (ValueError, SpecError) as error:
            raise CommitRefused(f"{where}: {error}") from error
        if spec.method != row["prune_method"]:
            raise CommitRefused(f"{where} names method {row['prune_method']} beside {spec.method}")
        fewest, most = spec.budget.bounds(total)
        if not fewest <= kept <= most:
            raise CommitRefused(
                f"{where} kept {kept} of {total} visual tokens where {spec.method} with its budget "
                f"keeps {_range(fewest, most)}: pruning did not do what the row says"
            )
        _check_mask(mask, total, kept, spec, where)


def _planned_rows(table: pa.Table) -> int:
    """Planned rows of the unit that the rows of `table` belong to. Raises CommitRefused where they
    disagree."""
    planned = set(table[PLANNED_FIELD.name].to_pylist())
    if len(planned) != 1 or None in planned:
        units = sorted(set(map(str, table["unit_id"].to_pylist())))
        raise CommitRefused(f"units {units}: rows of plans of {planned} rows in one commit")
    rows: int = planned.pop()
    return rows


def _check_mask(mask: bytes, total: int, kept: int, spec: PruneSpec, where: str) -> None:
    """Raises CommitRefused unless the mask has a bit for each token and marks as many as the
    method lets into the decoder: `kept`, or more where it drops some of them there."""
    bits = int.from_bytes(mask, "little")
    if len(mask) != -(-total // 8) or bits.bit_length() > total:
        raise CommitRefused(f"{where}: {len(mask)} bytes of kept_tokens do not fit {total} tokens")
    entered = bits.bit_count()
    if entered == kept:
        return  # Resolving a method loads torch, which a sink has no other use for.
    try:
        fewest, most = _entry_bounds(spec, total, kept)
    except SpecError as error:
        raise CommitRefused(f"{where}: {error}") from error
    if not fewest <= entered <= most:
        raise CommitRefused(
            f"{where} kept {kept} visual tokens by its count and {entered} by its kept_tokens, "
            f"where {spec.method} lets {_range(fewest, most)} of {total} enter the decoder: one of "
            "them does not say what the model saw"
        )


@lru_cache(maxsize=256)
def _spec(text: str) -> PruneSpec:
    return PruneSpec.from_dict(json.loads(text))


def _entry_bounds(spec: PruneSpec, total: int, kept: int) -> tuple[int, int]:
    """Fewest and most of `total` tokens that enter the decoder where the budget counts `kept`."""
    from sppruner.selectors import selector_for

    selector = selector_for(spec)
    return (kept, kept) if selector is None else selector.decoder_entry_bounds(total, kept)


def _range(fewest: int, most: int) -> str:
    return str(most) if fewest == most else f"{fewest} to {most}"
