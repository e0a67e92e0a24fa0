"""Opens the engine for a model: continuous batching wherever its decoder allows it."""

from __future__ import annotations

import logging
from typing import Any, Final

from sppruner.engine.base import ModelEngine
from sppruner.engine.continuous import ContinuousEngine
from sppruner.engine.static import BatchEngine
from sppruner.errors import UnsupportedModel
from sppruner.models.loading import LoadedModel, load_model

logger = logging.getLogger(__name__)

# `generate` allocates for all requests of a batch at once and cannot wait for memory.
_STATIC_SLOTS: Final = 16


def open_engine(
    model: str | LoadedModel,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **settings: Any,
) -> ModelEngine:
    """A `ContinuousEngine`, or a `BatchEngine` for a model that cannot run in slots: its decoder
    has windows of attention, or its generation config sets what only `generate` can do.

    settings: of `ModelEngine`; a static batch holds at most 16 requests. Raises UnsupportedModel
    for a model that neither engine can run.
    """
    if isinstance(model, str):
        model = load_model(model, revision=revision, device=device, dtype=dtype)
    try:
        return ContinuousEngine(model, **settings)
    except UnsupportedModel as error:
        slots = min(_STATIC_SLOTS, settings.pop("slots", _STATIC_SLOTS))
        # Raises the same error where the model itself is unsupported.
        engine = BatchEngine(model, slots=slots, **settings)
        logger.warning("answering in static batches: %s", error)
        return engine
