"""Visual-token pruning for Hugging Face vision-language models.

Imports torch and transformers only: no Ray, no object store, no HTTP.
"""

from sppruner.errors import SpprunerError
from sppruner.pruner import Generated, Prepared, Pruner
from sppruner.selectors import available
from sppruner.types import DENSE, Budget, PruneReport, PruneSpec, Selection, VisualTokens

__all__ = [
    "DENSE",
    "Budget",
    "Generated",
    "Prepared",
    "PruneReport",
    "PruneSpec",
    "Pruner",
    "Selection",
    "SpprunerError",
    "VisualTokens",
    "available",
]
