"""The output over time: a reader of the whole prefix must never meet a row twice.

Checked at every moment of the history of its objects, and not only at the end.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

Harm: TypeAlias = Literal["lost", "doubled", "stuck", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One broken promise."""

    harm: Harm
    """What it did to the run."""
    text: str
    """What was found, and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectWrite:
    """One change of an object that the store carried out."""

    key: str
    """Key relative to the output."""
    body: bytes | None = field(repr=False)
    """The new content; None where it was removed."""
    conditional: bool = True
    """Whether the store was asked to write it only where there was none."""


def is_visible(key: str) -> bool:
    """Whether a reader of Parquet data sets takes the object for rows."""
    hidden = any(part.startswith(("_", ".")) for part in key.split("/"))
    return key.endswith(".parquet") and not hidden


def read_rows(body: bytes) -> list[dict[str, Any]]:
    """The rows of one object. Raises what pyarrow raises where it is not Parquet."""
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(body)).to_pylist()
    return rows


def check_history(writes: Sequence[ObjectWrite]) -> list[Finding]:
    """What a reader could have seen between any two writes and must not."""
    findings: list[Finding] = []
    present: dict[str, bytes] = {}
    places: Counter[tuple[Any, Any]] = Counter()
    for write in writes:
        if not is_visible(write.key):
            continue
        before = present.pop(write.key, None)
        harm = None
        if before is not None:
            if write.body is None:
                harm = "was removed after its commit"
            elif _generation(write.body) != _generation(before) + 1:
                harm = "was written again after its commit"
            elif not _improves(before, write.body):
                harm = "was replaced by other rows after its commit"
            places.subtract(_places(before))
        elif write.body is not None and not write.conditional:
            harm = "was written whether or not it was there"
        if harm is not None:
            findings.append(Finding(harm="wrong", text=f"{write.key} {harm}"))
        if write.body is not None:
            present[write.key] = write.body
            added = list(_places(write.body))
            twice = sorted({place for place in added if places[place] > 0})
            places.update(added)
            if twice:
                text = f"{write.key} holds rows that another object holds: {twice[:3]}"
                findings.append(Finding(harm="doubled", text=text))
    return findings


def _generation(body: bytes) -> int:
    """How often failed rows of a unit were asked again; 0 of what is not Parquet."""
    try:
        pairs = pq.read_metadata(io.BytesIO(body)).metadata or {}
    except pa.ArrowException:
        return 0
    record = json.loads(pairs.get(b"sppruner.generation", b'{"generation": 0}'))
    return int(record["generation"])


def _improves(before: bytes, after: bytes) -> bool:
    """Whether the second object is a later generation of the first: the same rows, in which an
    error may have become an answer, and every answer is what it was."""
    old, new = ({p: r["text"] for p, r in zip(_places(b), read_rows(b), strict=True)}
                for b in (before, after))  # fmt: skip
    return old.keys() == new.keys() and all(new[p] == t for p, t in old.items() if t is not None)


def _places(body: bytes) -> Iterable[tuple[Any, Any]]:
    """(unit, row) of each row; none of what is not Parquet, which is no history's to judge."""
    try:
        table = pq.read_table(io.BytesIO(body), columns=["unit_id", "unit_row"])
    except pa.ArrowException:
        return ()
    return zip(table["unit_id"].to_pylist(), table["unit_row"].to_pylist(), strict=True)
