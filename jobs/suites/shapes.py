"""Models to time: the embedded model, and random weights in the proportions of 7B models.

Speed depends on widths and lengths, not on what a model has learned. `llava` is LLaVA-1.5-7B at
5/16 of its widths and half of its decoder's layers (0.32 B parameters in them), with 576 visual
tokens; `qwen` is Qwen2.5-VL-7B at a quarter of its widths and three quarters of its decoder's
layers (0.31 B), with 1,024. Vocabularies shrink so that the head keeps its share of the decoder,
and towers so that they keep theirs: by the cost model, tower and projector take 5.1 % of the FLOPs
of encoding and prefilling an image in `llava` (LLaVA-1.5-7B: 5.1 %), and 30.0 % in `qwen`
(Qwen2.5-VL-7B: 29.1 %).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final, Literal

from PIL import Image

from sppruner.tiny.scenes import HELD_OUT_SEED, render, sample_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWidths:
    """Widths and depths of a decoder and its vision tower."""

    family: Literal["llava", "qwen"]
    """Architecture of config and processor."""
    layers: int
    """Decoder layers."""
    hidden: int
    """Decoder width."""
    heads: int
    """Attention heads of a decoder layer."""
    kv_heads: int
    """Key-value heads of a decoder layer."""
    intermediate: int
    """Width of the decoder's MLP."""
    vocabulary: int
    """Vocabulary size; raised to the tokenizer's if smaller."""
    tower_layers: int
    """Layers of the vision tower."""
    tower_hidden: int
    """Width of the vision tower."""
    tower_heads: int
    """Attention heads of a tower layer."""
    tower_intermediate: int
    """Width of the tower's MLP."""
    full_attention: int = 8
    """Qwen: every n-th tower layer attends to the whole image, the others within windows."""

    def scaled(self, *, width: Fraction, depth: Fraction, tower_depth: Fraction) -> ModelWidths:
        """Scales widths and depths by these fractions; the width of a head stays."""
        widths = ["hidden", "heads", "kv_heads", "intermediate"]
        widths += ["tower_hidden", "tower_heads", "tower_intermediate"]
        fractions = {
            **dict.fromkeys(widths, width),
            "layers": depth,
            "vocabulary": width * depth,
            "tower_layers": tower_depth,
            "full_attention": tower_depth,
        }
        changed: dict[str, Any] = {
            n: int(getattr(self, n) * fraction) for n, fraction in fractions.items()
        }
        return replace(self, **changed)


LLAVA_7B: Final = ModelWidths(
    family="llava",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    intermediate=11008,
    vocabulary=32064,
    tower_layers=24,
    tower_hidden=1024,
    tower_heads=16,
    tower_intermediate=4096,
)
QWEN_7B: Final = ModelWidths(
    family="qwen",
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    intermediate=18944,
    vocabulary=152064,
    tower_layers=32,
    tower_hidden=1280,
    tower_heads=16,
    tower_intermediate=3420,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model to time and the size of its requests."""

    name: str
    """Value of --shape."""
    side: int
    """Side of the square images in pixels."""
    images: int
    """Images of one pass."""
    quick_images: int
    """The same with --quick."""
    rows: int
    """Most requests side by side."""
    widths: ModelWidths | None = None
    """Widths of the random weights; None: the embedded model."""
    needs_gpu: bool = False
    """Whether the model is refused on a machine without a GPU."""


_LLAVA: Final = ModelShape(
    name="llava",
    side=336,
    images=8,
    quick_images=2,
    rows=8,
    widths=LLAVA_7B.scaled(
        width=Fraction(5, 16), depth=Fraction(1, 2), tower_depth=Fraction(5, 12)
    ),
)
_QWEN: Final = ModelShape(
    name="qwen",
    side=896,
    images=8,
    quick_images=2,
    rows=8,
    widths=QWEN_7B.scaled(width=Fraction(1, 4), depth=Fraction(3, 4), tower_depth=Fraction(5, 8)),
)


def _unscaled(shape: ModelShape, widths: ModelWidths) -> ModelShape:
    return replace(
        shape,
        name=f"{shape.name}-7b",
        widths=widths,
        images=192,
        quick_images=32,
        rows=64,
        needs_gpu=True,
    )


_ALL: Final = (
    ModelShape(name="tiny", side=192, images=256, quick_images=32, rows=64),
    _LLAVA,
    _QWEN,
    _unscaled(_LLAVA, LLAVA_7B),
    _unscaled(_QWEN, QWEN_7B),
)
SHAPES: Final[Mapping[str, ModelShape]] = {shape.name: shape for shape in _ALL}


def draw_scenes(shape: ModelShape, count: int) -> list[Image.Image]:
    """Renders `count` different scenes at the shape's size."""
    return [render(sample_scene(HELD_OUT_SEED + n), shape.side) for n in range(count)]
