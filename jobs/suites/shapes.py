"""Models to time: the embedded one, and random weights in the proportions of published 7B models.

Speed depends on widths and lengths, not on what a model has learned. `llava` is LLaVA-1.5-7B at
5/16 of its widths and half of its decoder's layers (0.32 B parameters in them), with 576 visual
tokens; `qwen` is Qwen2.5-VL-7B at a quarter of its widths and three quarters of its decoder's
layers (0.31 B), with 1,024. Vocabularies shrink so that the head keeps its share of the decoder,
and towers so that they keep theirs: by the cost model, of the FLOPs of encoding an image and
reading its tokens, tower and projector are 5.1 % in `llava` as in LLaVA-1.5-7B (5.1 %), and 30.0 %
in `qwen` where Qwen2.5-VL-7B has 29.1 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final, Literal

from PIL import Image

from sppruner.tiny.scenes import HELD_OUT_SEED, render, sample_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Of a decoder and of its tower. full_attention: every so many layers of Qwen's tower, one that
    attends to the whole image; the others attend within windows."""

    family: Literal["llava", "qwen"]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tower_layers: int
    tower_hidden: int
    tower_heads: int
    tower_intermediate: int
    full_attention: int = 8

    def scaled(self, *, width: Fraction, depth: Fraction, tower_depth: Fraction) -> Widths:
        """So much of every width, with heads as wide as they were, and so much of the depths."""
        wide = ["hidden", "heads", "kv_heads", "intermediate"]
        wide += ["tower_hidden", "tower_heads", "tower_intermediate"]
        parts = {
            **dict.fromkeys(wide, width),
            "layers": depth,
            "vocabulary": width * depth,
            "tower_layers": tower_depth,
            "full_attention": tower_depth,
        }
        changed: dict[str, Any] = {n: int(getattr(self, n) * part) for n, part in parts.items()}
        return replace(self, **changed)


LLAVA_7B: Final = Widths(
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
QWEN_7B: Final = Widths(
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
class Shape:
    """A model and what it is asked. side: pixels of its square images. images: of one pass.
    rows: most requests side by side. widths: of random weights, or None for the embedded model."""

    name: str
    side: int
    images: int
    quick_images: int
    rows: int
    widths: Widths | None = None
    needs_gpu: bool = False


_LLAVA: Final = Shape(
    name="llava",
    side=336,
    images=8,
    quick_images=2,
    rows=8,
    widths=LLAVA_7B.scaled(
        width=Fraction(5, 16), depth=Fraction(1, 2), tower_depth=Fraction(5, 12)
    ),
)
_QWEN: Final = Shape(
    name="qwen",
    side=896,
    images=8,
    quick_images=2,
    rows=8,
    widths=QWEN_7B.scaled(width=Fraction(1, 4), depth=Fraction(3, 4), tower_depth=Fraction(5, 8)),
)


def _whole(shape: Shape, widths: Widths) -> Shape:
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
    Shape(name="tiny", side=192, images=256, quick_images=32, rows=64),
    _LLAVA,
    _QWEN,
    _whole(_LLAVA, LLAVA_7B),
    _whole(_QWEN, QWEN_7B),
)
SHAPES: Final[Mapping[str, Shape]] = {shape.name: shape for shape in _ALL}


def scenes(shape: Shape, count: int) -> list[Image.Image]:
    """Drawn scenes, all different."""
    return [render(sample_scene(HELD_OUT_SEED + n), shape.side) for n in range(count)]
