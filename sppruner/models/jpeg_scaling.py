"""JPEG scaling: the factor by which a JPEG may be decoded smaller, since the model's processor
shrinks it anyway.

libjpeg decodes at 1/2, 1/4 or 1/8 for a fraction of the work, and leaves the processor a fraction
of the pixels to shrink. Grids, tiles and so the number of visual tokens do not change: for an image
larger than the model's input they depend on its proportions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from sppruner.models import JpegScale

_Size: TypeAlias = tuple[int, int]
"""(rows, columns)"""

# A scaled image has at least so many times the rows and columns that the processor then shrinks it
# to. With 2, the pixel values of a photograph-like image change by less than 0.5 of 255 on average,
# about the loss of JPEG at quality 90, and by 21 at most; of a page of tiny letters by 2.4 and 26.
# With 1, Qwen's grids could change too.
MARGIN: Final = 2
_FACTORS: Final = (8, 4, 2)


def jpeg_scale_of(processor: Any) -> JpegScale:
    """The scale for a model with this processor; always 1 for image processors not listed below.

    LLaVA-OneVision, InternVL, Idefics3 and SmolVLM are not listed: they cut a photograph of 12
    megapixels into tiles of more pixels than any scale within the margin would leave.
    """
    images = processor.image_processor
    kind = type(images).__name__.removesuffix("Pil")
    if kind not in _SIZES or not images.do_resize:
        return lambda width, height: 1
    sizes_of = _SIZES[kind]

    def scale(width: int, height: int) -> int:
        sizes = sizes_of(images, (height, width))
        if not sizes:
            return 1
        rows, columns = (MARGIN * max(sides) for sides in zip(*sizes, strict=True))
        for factor in _FACTORS:
            # A side that is not divided evenly ends in pixels that stand for less than the others,
            # which stretches the image: up to five times the difference. Where both are divided
            # evenly, proportions stay bit-equal.
            even = width % factor == height % factor == 0
            if even and height // factor >= rows and width // factor >= columns:
                return factor
        return 1

    return scale


def _clip(images: Any, size: _Size) -> Sequence[_Size]:
    """One size, of which the processor may crop the centre."""
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
    """The largest size that fits a canvas of tiles, and one tile."""
    tile = dict(images.size).get("shortest_edge")
    if tile is None:
        return []
    canvas = select_best_resolution(size, images.image_grid_pinpoints)
    return [get_patch_output_size(_blank(size), canvas, ChannelDimension.FIRST), (tile, tile)]


def _qwen(images: Any, size: _Size) -> Sequence[_Size]:
    """One size, a whole number of tokens along each side."""
    try:
        return [
            smart_resize(
                *size,
                factor=images.patch_size * images.merge_size,
                min_pixels=images.size["shortest_edge"],
                max_pixels=images.size["longest_edge"],
            )
        ]
    except ValueError:  # Too narrow: the processor refuses the image.
        return []


def _blank(size: _Size) -> np.ndarray:
    """An image for functions that read only its shape; it takes one byte."""
    return np.broadcast_to(np.uint8(0), (3, *size))


# The sizes that each image processor shrinks a whole image to.
_SIZES: Final[dict[str, Callable[[Any, _Size], Sequence[_Size]]]] = {
    "CLIPImageProcessor": _clip,
    "LlavaNextImageProcessor": _llava_next,
    "Qwen2VLImageProcessor": _qwen,
}
