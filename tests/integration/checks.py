"""Invariants of every finished run, under any faults."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow.parquet as pq

from cluster.demo import Fault
from cluster.output.run_output import RunOutput
from cluster.store import open_store

POSITION = ("unit_id", "unit_row")


def committed(output: str) -> list[dict[str, Any]]:
    """Every committed row, in corpus order, as a Parquet reader of the prefix returns them."""
    manifest = RunOutput.open(output).manifest()
    assert manifest is not None
    order = {unit.unit_id: number for number, unit in enumerate(manifest.units)}
    rows = pq.read_table(output).to_pylist()
    return sorted(rows, key=lambda row: (order[row["unit_id"]], row["unit_row"]))


def planted_faults(corpus: str) -> list[Fault]:
    listing = json.loads(open_store(corpus).get("_faults.json"))
    faults = listing["faults"] if isinstance(listing, dict) else listing
    return [Fault(**fault) for fault in faults]


def check_every_row_once(rows: list[dict[str, Any]], expected: int) -> None:
    positions = Counter(tuple(row[name] for name in POSITION) for row in rows)
    assert max(positions.values()) == 1
    assert len(rows) == expected
    for row in rows:
        assert (row["text"] is None) != (row["error_code"] is None)
        assert (row["error_stage"] is None) == (row["error_code"] is None)


def check_pruned(rows: list[dict[str, Any]], *, tokens: int, kept: int) -> None:
    answered = [row for row in rows if row["error_code"] is None]
    assert answered
    for row in answered:
        assert (row["visual_tokens"], row["visual_tokens_kept"]) == (tokens, kept)
        assert row["prune_method"] == "sppruner"


def check_faults(rows: list[dict[str, Any]], faults: list[Fault]) -> None:
    """Each planted fault has its expected error code, and no other row failed."""
    expected = {fault.row: fault for fault in faults}
    for number, row in enumerate(rows):
        fault = expected.get(number)
        if fault is not None:
            assert row["error_code"] == fault.error_code, fault
            assert row["key"] == fault.key, fault
        elif row["error_code"] is not None:
            assert row["error_code"] == "archive_truncated", row["key"]
