"""The engine for a model: continuous batching wherever its decoder allows it."""

from __future__ import annotations

import logging
from typing import Any

from sppruner.engine.base import ModelEngine
from sppruner.engine.batch import BatchEngine
from sppruner.engine.continuous import ContinuousEngine
from sppruner.engine.loading import LoadedModel, load_model
from sppruner.errors import UnsupportedModel

logger = logging.getLogger(__name__)


def open_engine(
    model: str | LoadedModel,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **settings: Any,
) -> ModelEngine:
    """A `ContinuousEngine`, or a `BatchEngine` for a model that cannot run in slots: its decoder
    has windows of attention, or its generation config asks for what only `generate` can do.

    settings: of `ModelEngine`. Raises UnsupportedModel for a model that neither can run.
    """
    if isinstance(model, str):
        model = load_model(model, revision=revision, device=device, dtype=dtype)
    try:
        return ContinuousEngine(model, **settings)
    except UnsupportedModel as error:
        engine = BatchEngine(model, **settings)  # raises the same where the model is at fault
        logger.warning("answering in static batches: %s", error)
        return engine
