"""Cost of the encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any image size, 2 × 2 merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sppruner.cost.model_cost import ImageShape


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenEncoderCost:
    """A vision tower at an image's native resolution, and mergers: two-layer MLPs, each from
    `merge` concatenated patches to one token."""

    layers: int
    """Tower layers."""
    hidden: int
    """Width of the tower."""
    intermediate: int
    """Inner width of the tower's MLP."""
    gated: bool
    """Whether the tower's MLP is a SwiGLU."""
    patch_values: int
    """Pixel values of one patch, over all its frames."""
    merge: int
    """Patches merged into one token."""
    width: int
    """Width of the language model."""
    windowed_layers: int = 0
    """Layers with window attention; the others attend to the whole image."""
    window: int = 1
    """Side of an attention window in patches; windows at the right and bottom edges are smaller."""
    mergers: int = 1
    """One for the features, and one per decoder layer with DeepStack input (Qwen3-VL)."""

    @classmethod
    def qwen2(cls, config: Any) -> QwenEncoderCost:
        """From a Qwen2-VL config."""
        vision = config.vision_config
        return cls(
            layers=vision.depth,
            hidden=vision.embed_dim,
            intermediate=int(vision.embed_dim * vision.mlp_ratio),
            gated=False,
            patch_values=_patch_values(vision),
            merge=vision.spatial_merge_size**2,
            width=vision.hidden_size,
        )

    @classmethod
    def qwen2_5(cls, config: Any) -> QwenEncoderCost:
        """From a Qwen2.5-VL config."""
        vision = config.vision_config
        full = sum(1 for layer in range(vision.depth) if layer in vision.fullatt_block_indexes)
        side = vision.spatial_merge_size
        return cls(
            layers=vision.depth,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            gated=True,
            patch_values=_patch_values(vision),
            merge=side**2,
            width=vision.out_hidden_size,
            windowed_layers=vision.depth - full,
            window=vision.window_size // side // vision.patch_size * side,
        )

    @classmethod
    def qwen3(cls, config: Any) -> QwenEncoderCost:
        """From a Qwen3-VL config."""
        vision = config.vision_config
        return cls(
            layers=vision.depth,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            gated=False,
            patch_values=_patch_values(vision),
            merge=vision.spatial_merge_size**2,
            width=vision.out_hidden_size,
            mergers=1 + len(vision.deepstack_visual_indexes),
        )

    def vision(self, image: ImageShape) -> int:
        """FLOPs of the tower."""
        d, n = self.hidden, image.rows * image.columns
        linear = 2 * n * d * (4 * d + (3 if self.gated else 2) * self.intermediate)
        # Windows form a grid of spans along both axes: their squared areas sum to this product.
        pairs = _squares(image.rows, self.window) * _squares(image.columns, self.window)
        attention = (self.layers - self.windowed_layers) * n * n + self.windowed_layers * pairs
        return 2 * n * self.patch_values * d + self.layers * linear + 4 * d * attention

    def projector(self, image: ImageShape) -> int:
        """FLOPs of all mergers."""
        merged = self.merge * self.hidden
        return self.mergers * 2 * image.tokens * merged * (merged + self.width)


def _patch_values(vision: Any) -> int:
    return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)


def _squares(length: int, window: int) -> int:
    """The sum of squares of the spans of `length` cut into spans of `window` and a shorter last."""
    spans, rest = divmod(length, window)
    return spans * window**2 + rest**2
