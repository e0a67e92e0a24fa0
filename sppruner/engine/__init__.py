"""Engines: a model instance that answers requests, each with its own pruning spec. No Ray here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sppruner.engine.types import Engine, Generation, Request, Result

if TYPE_CHECKING:
    from sppruner.engine.batch import BatchEngine

__all__ = ["BatchEngine", "Engine", "Generation", "Request", "Result"]


def __getattr__(name: str) -> Any:
    # torch and transformers come with the engine, not with the requests that travel to it.
    if name != "BatchEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sppruner.engine.batch import BatchEngine

    return BatchEngine
