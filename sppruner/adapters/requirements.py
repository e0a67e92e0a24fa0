"""Checks of model variants that several adapters share."""

from __future__ import annotations

from typing import Any

from sppruner.errors import UnsupportedModel

DENSE_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of decoders that `sppruner.cost.DecoderCost` models exactly: SwiGLU and grouped-query
attention."""


def require_dense_decoder(config: Any) -> None:
    """Raises UnsupportedModel for a decoder whose cost is not modelled, such as one with experts:
    its savings would be unknown."""
    kind = config.text_config.model_type
    if kind not in DENSE_DECODERS:
        raise UnsupportedModel(
            f"{config.model_type} with a {kind} decoder: its cost is not modelled; load a "
            f"checkpoint with one of {', '.join(DENSE_DECODERS)}"
        )


def require_tower(config: Any, kind: str) -> None:
    """Raises UnsupportedModel unless the vision tower has model type `kind`."""
    found = config.vision_config.model_type
    if found != kind:
        raise UnsupportedModel(
            f"{config.model_type} with a {found} tower: load a checkpoint with a {kind} one"
        )


def require_features(config: Any, strategy: str) -> None:
    """Raises UnsupportedModel unless a feature is one patch of one layer's output: for concatenated
    layers, the embeddings before all layers, and a select strategy other than `strategy`, which
    would treat the CLS token as a patch or a patch as the CLS token."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise UnsupportedModel(
            f"{config.model_type} that concatenates vision layers {layer} is not supported: load a "
            "checkpoint that reads one layer"
        )
    if layer in (0, -1 - config.vision_config.num_hidden_layers):
        raise UnsupportedModel(
            f"{config.model_type} with vision_feature_layer={layer} reads the tower's embeddings, "
            "for which no layer has attended: load a checkpoint that reads a layer's output"
        )
    if config.vision_feature_select_strategy != strategy:
        raise UnsupportedModel(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}: "
            f"load the model with {strategy!r}, which is what its tower needs"
        )
