"""The engine for a model: continuous batching wherever its decoder allows it."""

from __future__ import annotations

import logging
from typing import Any, Final

from sppruner.engine.base import ModelEngine
from sppruner.engine.continuous import ContinuousEngine
from sppruner.engine.static import BatchEngine
from sppruner.errors import UnsupportedModel
from sppruner.models.loading import LoadedModel, load_model

logger = logging.getLogger(__name__)

# `generate` takes memory for all rows of a batch at once, with nobody to ask whether it is there.
_STATIC_ROWS: Final = 16


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

    settings: of `ModelEngine`; static batches have 16 rows at most. Raises UnsupportedModel for a
    model that neither can run.
    """
    if isinstance(model, str):
        model = load_model(model, revision=revision, device=device, dtype=dtype)
    try:
        return ContinuousEngine(model, **settings)
    except UnsupportedModel as error:
        rows = min(_STATIC_ROWS, settings.pop("slots", _STATIC_ROWS))
        # Raises the same where the model is at fault.
        engine = BatchEngine(model, slots=rows, **settings)
        logger.warning("answering in static batches: %s", error)
        return engine
