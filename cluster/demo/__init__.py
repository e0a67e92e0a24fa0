"""Demonstration corpora: held-out procedural scenes as caption or VQA rows, intact or faulty."""

from __future__ import annotations

from cluster.demo.drawn_rows import DrawnRow, draw_rows
from cluster.demo.faults import Fault, plant_faults
from cluster.demo.files import CUT_BYTES, encode_parquet, encode_tar

__all__ = [
    "CUT_BYTES",
    "DrawnRow",
    "Fault",
    "draw_rows",
    "encode_parquet",
    "encode_tar",
    "plant_faults",
]
