"""Modelled cost of a prompt, from the model's config alone: FLOPs by part and KV-cache bytes.

A multiply-add counts as 2. Attention counts every query-key pair (no causal discount), as
`torch.utils.flop_counter.FlopCounterMode` does, with which the parts agree to the integer under
eager attention (tests/sppruner/test_cost.py). Norms, softmax and activations are not counted.
Modelled figures say what the arithmetic is; they never stand in for measured seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("vision", "projector", "pruner", "prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """One row as it ran beside the same row dense. FLOPs by part of `PARTS`; KV cache in bytes
    after the last generated token."""

    flops: Mapping[str, int]
    flops_dense: Mapping[str, int]
    kv_bytes: int
    kv_bytes_dense: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "flops": dict(self.flops),
            "flops_dense": dict(self.flops_dense),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_dense": self.kv_bytes_dense,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RowCost:
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderCost:
    """A Llama-like decoder (SwiGLU, grouped-query attention)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    bytes_per_value: int = 2

    @classmethod
    def from_config(cls, text: Any, *, bytes_per_value: int = 2) -> DecoderCost:
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            bytes_per_value=bytes_per_value,
        )

    def layer(self, queries: int, keys: int) -> int:
        """FLOPs of one layer for `queries` new tokens that attend to `keys` tokens."""
        d, width, kv_width = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        linear = (
            2 * queries * (d * width + 2 * d * kv_width + width * d + 3 * d * self.intermediate)
        )
        return linear + 4 * width * queries * keys

    @property
    def head(self) -> int:
        return 2 * self.hidden * self.vocabulary

    def prefill(self, tokens: int) -> int:
        """The prompt through every layer, and the head at its last position."""
        return self.layers * self.layer(tokens, tokens) + self.head

    def decode(self, prompt_tokens: int, new_tokens: int) -> int:
        """The forwards after the prefill: `new_tokens` − 1 of them, one token each."""
        steps = range(1, new_tokens)
        return sum(self.layers * self.layer(1, prompt_tokens + t) + self.head for t in steps)

    def kv_bytes(self, prompt_tokens: int, new_tokens: int) -> int:
        """Keys and values held once the last token is out (it is never fed back)."""
        held = prompt_tokens + max(0, new_tokens - 1)
        return self.layers * 2 * self.kv_heads * self.head_dim * held * self.bytes_per_value


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipTowerCost:
    """A CLIP vision tower: patches and one CLS token through every layer. The layer after the
    one whose features are used runs too, so it counts."""

    layers: int
    hidden: int
    intermediate: int
    patch: int
    patches: int
    channels: int = 3

    @classmethod
    def from_config(cls, vision: Any) -> ClipTowerCost:
        side = vision.image_size // vision.patch_size
        return cls(
            layers=vision.num_hidden_layers,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            patch=vision.patch_size,
            patches=side * side,
            channels=vision.num_channels,
        )

    def forward(self) -> int:
        """FLOPs of one image."""
        d, n = self.hidden, self.patches + 1
        embed = 2 * self.patches * self.channels * self.patch**2 * d
        return embed + self.layers * (8 * n * d * d + 4 * n * d * self.intermediate + 4 * n * n * d)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaCost:
    """LLaVA-1.5: CLIP tower, two-layer projector, Llama-like decoder."""

    tower: ClipTowerCost
    decoder: DecoderCost
    projector_input: int

    @classmethod
    def from_config(cls, config: Any, *, bytes_per_value: int = 2) -> LlavaCost:
        layers = config.vision_feature_layer
        concatenated = len(layers) if isinstance(layers, list | tuple) else 1
        return cls(
            tower=ClipTowerCost.from_config(config.vision_config),
            decoder=DecoderCost.from_config(config.text_config, bytes_per_value=bytes_per_value),
            projector_input=config.vision_config.hidden_size * concatenated,
        )

    def projector(self, tokens: int) -> int:
        d = self.decoder.hidden
        return 2 * tokens * (self.projector_input * d + d * d)

    def row(
        self,
        *,
        images: int,
        visual_tokens: int,
        prompt_tokens: int,
        prompt_tokens_dense: int,
        new_tokens: int,
        pruner_flops: int,
    ) -> RowCost:
        """The cost of one row. Selection follows the projector, so vision and projector cost the
        same in both columns; the pruner's own work stands in the pruned one only."""
        shared = {
            "vision": images * self.tower.forward(),
            "projector": self.projector(visual_tokens),
        }

        def parts(pruner: int, prompt: int) -> dict[str, int]:
            return shared | {
                "pruner": pruner,
                "prefill": self.decoder.prefill(prompt),
                "decode": self.decoder.decode(prompt, new_tokens),
            }

        return RowCost(
            flops=parts(pruner_flops, prompt_tokens),
            flops_dense=parts(0, prompt_tokens_dense),
            kv_bytes=self.decoder.kv_bytes(prompt_tokens, new_tokens),
            kv_bytes_dense=self.decoder.kv_bytes(prompt_tokens_dense, new_tokens),
        )
