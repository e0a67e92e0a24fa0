"""Engines: a model instance that answers requests, each with its own pruning spec. No Ray here."""

from sppruner.engine.batch import BatchEngine
from sppruner.engine.types import Engine, Generation, Request, Result

__all__ = ["BatchEngine", "Engine", "Generation", "Request", "Result"]
