"""The registry of adapters, one per model family, by the config's `model_type`."""

from __future__ import annotations

from typing import Any

from sppruner.adapters.base import Adapter, Encoded, EncodedImage, Kept, TowerOutput
from sppruner.adapters.idefics3 import Idefics3Adapter
from sppruner.adapters.internvl import InternVLAdapter
from sppruner.adapters.llava import LlavaAdapter
from sppruner.adapters.llava_next import LlavaNextAdapter
from sppruner.adapters.llava_onevision import LlavaOnevisionAdapter
from sppruner.adapters.qwen_vl import Qwen2_5_VLAdapter, Qwen2VLAdapter, Qwen3VLAdapter
from sppruner.capabilities import Capabilities
from sppruner.cost import ModelCost
from sppruner.errors import UnsupportedModel

_CLASSES: tuple[type[Adapter], ...] = (
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    InternVLAdapter,
    Idefics3Adapter,
    Qwen2VLAdapter,
    Qwen2_5_VLAdapter,
    Qwen3VLAdapter,
)
_ADAPTERS = {family: adapter for adapter in _CLASSES for family in adapter.families}


def families() -> list[str]:
    """All `model_type`s that have an adapter."""
    return sorted(_ADAPTERS)


def adapter_class(config: Any) -> type[Adapter]:
    """The adapter class for a model config. Raises UnsupportedModel, which names the families."""
    if config.model_type not in _ADAPTERS:
        raise UnsupportedModel(
            f"no adapter for model type {config.model_type!r}; known: {', '.join(families())}"
        )
    return _ADAPTERS[config.model_type]


def capabilities(config: Any) -> Capabilities:
    """The capabilities of a model with this config. Raises UnsupportedModel."""
    return adapter_class(config).capabilities_of(config)


def cost_of(config: Any, *, bytes_per_value: int = 2) -> ModelCost:
    """The cost model of a config. bytes_per_value: of the KV cache. Raises UnsupportedModel."""
    return adapter_class(config).cost_of(config, bytes_per_value=bytes_per_value)


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model instance. Raises UnsupportedModel."""
    return adapter_class(model.config)(model)


__all__ = [
    "Adapter",
    "Encoded",
    "EncodedImage",
    "Idefics3Adapter",
    "InternVLAdapter",
    "Kept",
    "LlavaAdapter",
    "LlavaNextAdapter",
    "LlavaOnevisionAdapter",
    "Qwen2VLAdapter",
    "Qwen2_5_VLAdapter",
    "Qwen3VLAdapter",
    "TowerOutput",
    "adapter_class",
    "adapter_for",
    "capabilities",
    "cost_of",
    "families",
]
