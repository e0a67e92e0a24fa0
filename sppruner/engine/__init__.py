"""Engines: a model instance that answers requests, each with its own pruning spec. No Ray here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sppruner.engine.interface import Engine, Request, Result, SamplingParams

if TYPE_CHECKING:
    from sppruner.engine.continuous import ContinuousEngine
    from sppruner.engine.factory import open_engine
    from sppruner.engine.static import BatchEngine

__all__ = [
    "BatchEngine",
    "ContinuousEngine",
    "Engine",
    "Request",
    "Result",
    "SamplingParams",
    "open_engine",
]

# torch and transformers come with the engines, not with the requests that travel to them.
_ENGINES = {
    "BatchEngine": "sppruner.engine.static",
    "ContinuousEngine": "sppruner.engine.continuous",
    "open_engine": "sppruner.engine.factory",
}


def __getattr__(name: str) -> Any:
    if name not in _ENGINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ENGINES[name]), name)
