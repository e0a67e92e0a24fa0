"""Evaluation: methods against dense on the same questions, with intervals and fidelity."""

from sppruner.evaluation.compare import Cannot, Comparison, answers_due, compare
from sppruner.evaluation.dataset import Dataset, Item
from sppruner.evaluation.drawn_scenes import CAPTION, drawn_scenes
from sppruner.evaluation.formats import FORMATS, read_dataset
from sppruner.evaluation.records import ahead_of, cannot, label, rows
from sppruner.evaluation.score import Score, Share

__all__ = [
    "CAPTION",
    "FORMATS",
    "Cannot",
    "Comparison",
    "Dataset",
    "Item",
    "Score",
    "Share",
    "ahead_of",
    "answers_due",
    "cannot",
    "compare",
    "drawn_scenes",
    "label",
    "read_dataset",
    "rows",
]
