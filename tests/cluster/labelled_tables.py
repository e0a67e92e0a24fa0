"""Labelled rows of one unit, as the labeller passes them to the commit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from cluster.output.checks import ExpectedUnits
from cluster.schema import PLANNED_FIELD, UNIT_FIELD, output_schema
from sppruner.spec import Budget, PruneSpec

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))
EXPECTED = ExpectedUnits(
    run_id="run",
    kind="caption",
    source_schema=pa.schema([("note", pa.string())]),
)


def mask(kept: int, of: int) -> bytes:
    """A mask of `of` tokens with the last `kept` set, so that the end of the mask is tested."""
    return np.packbits(np.arange(of) >= of - kept, bitorder="little").tobytes()


def row(number: int, **values: Any) -> dict[str, Any]:
    """Row `number` of the unit, answered and pruned by SPEC; `values` override its columns."""
    answered = {
        "note": f"n{number}",
        "key": f"k{number}",
        "text": f"t{number}",
        "attempts": 1,
        "visual_tokens": 100,
        "visual_tokens_kept": 25,
        "kept_tokens": mask(25, 100),
        "prune_method": SPEC.method,
        "prune_spec": SPEC.to_json(),
        "seconds": 0.5,
        "is_control": False,
        "discarded_seconds": 0.0,
        "run_id": "run",
        "unit_id": "unit",
        "unit_row": number,
        "_in_unit": "unit",
        "_in_unit_rows": 1 if values.get("unit_id") == "other" else 3,
    }
    return answered | values


def table(*rows: dict[str, Any]) -> pa.Table:
    schema = output_schema(EXPECTED.source_schema, EXPECTED.kind)
    extra = [UNIT_FIELD, PLANNED_FIELD]
    return pa.Table.from_pylist(list(rows), schema=pa.schema([*schema, *extra]))
