"""Engines: one model instance that answers requests, each under its own pruning spec; no Ray."""

from __future__ import annotations

import importlib
import warnings
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

# The engines import torch and transformers; requests, which travel between processes, do not.
_ENGINES = {
    "BatchEngine": "sppruner.engine.static",
    "ContinuousEngine": "sppruner.engine.continuous",
    "open_engine": "sppruner.engine.factory",
}


def __getattr__(name: str) -> Any:
    if name == "Generation":
        warnings.warn(
            "sppruner.engine.Generation is now sppruner.engine.SamplingParams",
            DeprecationWarning,
            stacklevel=2,
        )
        return SamplingParams
    if name not in _ENGINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ENGINES[name]), name)
