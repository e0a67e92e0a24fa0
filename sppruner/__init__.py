"""Visual-token pruning for Hugging Face vision-language models.

Imports torch and transformers only: no Ray, no object store, no HTTP. They are imported when a name
that needs them is first used: a process that only carries specs around starts without them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sppruner.errors import SpprunerError
from sppruner.spec import DENSE, Budget, PruneSpec

if TYPE_CHECKING:
    from sppruner.pruner import Generated, Prepared, Pruner
    from sppruner.selectors import available
    from sppruner.types import PruneReport, Selection, VisualTokens

_HOMES = {
    "Generated": "sppruner.pruner",
    "Prepared": "sppruner.pruner",
    "PruneReport": "sppruner.types",
    "Pruner": "sppruner.pruner",
    "Selection": "sppruner.types",
    "VisualTokens": "sppruner.types",
    "available": "sppruner.selectors",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
