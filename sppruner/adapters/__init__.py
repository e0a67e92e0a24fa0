"""One adapter per model family, found by the config's `model_type`."""

from __future__ import annotations

from typing import Any

from sppruner.adapters.base import Adapter, Encoded
from sppruner.adapters.llava import LlavaAdapter
from sppruner.errors import UnsupportedModel

_ADAPTERS: dict[str, type[Adapter]] = {LlavaAdapter.family: LlavaAdapter}


def adapter_for(model: Any) -> Adapter:
    """The adapter of `model`'s family. Raises UnsupportedModel with the list of known families."""
    family = model.config.model_type
    if family not in _ADAPTERS:
        raise UnsupportedModel(f"no adapter for model type {family!r}; known: {sorted(_ADAPTERS)}")
    return _ADAPTERS[family](model)


__all__ = ["Adapter", "Encoded", "LlavaAdapter", "adapter_for"]
