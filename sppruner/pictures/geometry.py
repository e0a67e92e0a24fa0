"""Positions of visual tokens in the image: the box of each plane, and the tokens of an outline.

Shapes: N visual tokens of one plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from sppruner.types import VisualTokens

Box: TypeAlias = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of the image's sides."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
"""The box of a plane that shows the whole image."""

_RASTER = 384
# Below this share of its patch, a token is at the outline's edge and not covered by it.
_COVERED = 0.25


def plane_boxes(planes: Sequence[VisualTokens], size: tuple[int, int]) -> list[Box]:
    """The box of each plane of one image of `size` (width, height).

    One or two planes are views of the whole image (LLaVA; LLaVA-NeXT's low and high resolution).
    More are tiles in raster order followed by a view of the whole image (InternVL, SmolVLM). The
    grid of tiles is the one whose aspect ratio is closest to the image's, as in those families'
    processors.
    """
    if len(planes) <= 2:
        return [WHOLE] * len(planes)
    rows, columns = _tile_grid(len(planes) - 1, size[0] / size[1])
    boxes = [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
    return [*boxes, WHOLE]


def _tile_grid(tiles: int, aspect: float) -> tuple[int, int]:
    pairs = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(pairs, key=lambda pair: abs(pair[1] / pair[0] - aspect))


def visible_crop(image: Image.Image, image_processor: object) -> Image.Image:
    """The part of an image that the encoder sees: LLaVA-1.5's processor crops the centre square.

    LLaVA-NeXT's processor has the same setting, but crops tiles that are square already.
    """
    crops = getattr(image_processor, "do_center_crop", False)
    if not crops or hasattr(image_processor, "image_grid_pinpoints"):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def covered_tokens(
    outline: Sequence[tuple[float, float]],
    planes: Sequence[VisualTokens],
    boxes: Sequence[Box],
) -> list[np.ndarray]:
    """For each plane, whether an outline of (x, y) fractions covers each token: [N] bool.

    A token is covered if the outline covers at least a quarter of its patch. In each plane that the
    outline touches, the token of largest share counts always, so that an outline smaller than a
    patch covers one token.
    """
    raster = Image.new("L", (_RASTER, _RASTER))
    corners = [(x * _RASTER, y * _RASTER) for x, y in outline]
    ImageDraw.Draw(raster).polygon(corners, fill=1)
    filled = raster.convert("F")
    masks = []
    for plane, box in zip(planes, boxes, strict=True):
        rows, columns = plane.grid
        left, top, right, bottom = (side * _RASTER for side in box)
        patches = filled.resize(
            (columns, rows), Image.Resampling.BOX, box=(left, top, right, bottom)
        )
        shares = np.asarray(patches)
        row_N, column_N = plane.coords_N2.cpu().numpy().T
        share_N = shares[row_N, column_N]
        masks.append((share_N > 0) & (share_N >= min(_COVERED, share_N.max())))
    return masks
