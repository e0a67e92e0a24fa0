"""One adapter per model family, found by the config's `model_type`."""

from __future__ import annotations

from typing import Any

from sppruner.adapters.base import Adapter, Encoded
from sppruner.adapters.llava import LlavaAdapter
from sppruner.errors import UnsupportedModel

_ADAPTERS: dict[str, type[Adapter]] = {LlavaAdapter.family: LlavaAdapter}


def adapter_class(config: Any) -> type[Adapter]:
    """The adapter of a model config's family. Raises UnsupportedModel with the known families."""
    if config.model_type not in _ADAPTERS:
        known = ", ".join(sorted(_ADAPTERS))
        raise UnsupportedModel(f"no adapter for model type {config.model_type!r}; known: {known}")
    return _ADAPTERS[config.model_type]


def adapter_for(model: Any) -> Adapter:
    """An adapter of `model`'s family for this instance. Raises UnsupportedModel."""
    return adapter_class(model.config)(model)


__all__ = ["Adapter", "Encoded", "LlavaAdapter", "adapter_class", "adapter_for"]
