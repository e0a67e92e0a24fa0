"""By how much a JPEG may be decoded smaller, as the model's processor shrinks it anyway.

libjpeg decodes at 1/2, 1/4 or 1/8 for a fraction of the work, and leaves the processor a fraction
of the pixels to shrink. Grids, tiles and so the number of visual tokens stay what they were: they
follow from an image's proportions and, where it is larger than they ask for, from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from sppruner.engine.interface import Reduction

_Size: TypeAlias = tuple[int, int]
"""(rows, columns)"""

# Along both sides, a reduced image is at least so many times what it is then shrunk to. With 2,
# what a model is given of a photograph-like image changes by less than 0.5 of 255 on average, about
# what JPEG takes away at quality 90, and by 21 at most; of a page of tiny letters by 2.4 and 26.
# With 1, Qwen's grids could change too.
MARGIN: Final = 2
_FACTORS: Final = (8, 4, 2)


def jpeg_scale_of(processor: Any) -> Reduction:
    """The reductions for a model with this processor; always 1 where its images are prepared in
    another way than those below.

    LLaVA-OneVision, InternVL, Idefics3 and SmolVLM are left out: of a photograph of 12 megapixels
    they make tiles of more pixels than any reduction within the margin would leave.
    """
    images = processor.image_processor
    kind = type(images).__name__.removesuffix("Pil")
    if kind not in _SIZES or not images.do_resize:
        return lambda width, height: 1
    sizes_of = _SIZES[kind]

    def reduction(width: int, height: int) -> int:
        sizes = sizes_of(images, (height, width))
        if not sizes:
            return 1
        rows, columns = (MARGIN * max(sides) for sides in zip(*sizes, strict=True))
        for factor in _FACTORS:
            # Where a side is not divided evenly, its last pixels stand for less than the others and
            # stretch the whole: up to five times the difference. Where both are, proportions stay
            # the same to the last bit.
            even = width % factor == height % factor == 0
            if even and height // factor >= rows and width // factor >= columns:
                return factor
        return 1

    return reduction


def _clip(images: Any, size: _Size) -> Sequence[_Size]:
    """One size, from which the centre may be cut."""
    match dict(images.size):
        case {"shortest_edge": edge, **others} if not others:
            return [
                get_resize_output_image_size(
                    _blank(size),
                    size=edge,
                    default_to_square=False,
                    input_data_format=ChannelDimension.FIRST,
                )
            ]
        case {"height": rows, "width": columns, **others} if not others:
            return [(rows, columns)]
    return []


def _llava_next(images: Any, size: _Size) -> Sequence[_Size]:
    """As large as fits on a canvas of tiles, and as one tile."""
    tile = dict(images.size).get("shortest_edge")
    if tile is None:
        return []
    canvas = select_best_resolution(size, images.image_grid_pinpoints)
    return [get_patch_output_size(_blank(size), canvas, ChannelDimension.FIRST), (tile, tile)]


def _qwen(images: Any, size: _Size) -> Sequence[_Size]:
    """One size, in whole tokens."""
    try:
        return [
            smart_resize(
                *size,
                factor=images.patch_size * images.merge_size,
                min_pixels=images.size["shortest_edge"],
                max_pixels=images.size["longest_edge"],
            )
        ]
    except ValueError:  # All but a line of pixels: the processor will refuse it.
        return []


def _blank(size: _Size) -> np.ndarray:
    """An image for functions that look at its shape alone; it takes one byte."""
    return np.broadcast_to(np.uint8(0), (3, *size))


# To which sizes a processor shrinks the whole of an image.
_SIZES: Final[dict[str, Callable[[Any, _Size], Sequence[_Size]]]] = {
    "CLIPImageProcessor": _clip,
    "LlavaNextImageProcessor": _llava_next,
    "Qwen2VLImageProcessor": _qwen,
}
