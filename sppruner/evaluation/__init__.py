"""Evaluation: pruning methods and dense on the same questions, with intervals and fidelity."""

from sppruner.evaluation.compare import Comparison, UnsupportedSpec, compare, count_answers
from sppruner.evaluation.dataset import Dataset, Item
from sppruner.evaluation.drawn_scenes import CAPTION, drawn_scenes
from sppruner.evaluation.formats import FORMATS, read_dataset
from sppruner.evaluation.records import (
    method_label,
    paired_differences,
    result_records,
    unsupported_records,
)
from sppruner.evaluation.score import Estimate, SpecScore

__all__ = [
    "CAPTION",
    "FORMATS",
    "Comparison",
    "Dataset",
    "Estimate",
    "Item",
    "SpecScore",
    "UnsupportedSpec",
    "compare",
    "count_answers",
    "drawn_scenes",
    "method_label",
    "paired_differences",
    "read_dataset",
    "result_records",
    "unsupported_records",
]
