"""Demonstration corpora: held-out procedural scenes as caption or VQA rows, sound or broken."""

from __future__ import annotations

from cluster.demo.drawn_rows import Row, draw_rows
from cluster.demo.faults import Fault, plant
from cluster.demo.files import parquet_file, tar_file

__all__ = ["Fault", "Row", "draw_rows", "parquet_file", "plant", "tar_file"]
