"""Where visual tokens lie in the image: planes as boxes, and the tokens an outline covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from sppruner.types import VisualTokens

Box: TypeAlias = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of the image's sides."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_RASTER = 384
# A token whose patch an outline covers less than this is at its edge, not of it.
_COVERED = 0.25


def plane_boxes(planes: Sequence[VisualTokens], size: tuple[int, int]) -> list[Box]:
    """The box of each plane of one image of `size` (width, height).

    One plane or two are views of the whole image (LLaVA; LLaVA-NeXT's low and high resolution).
    More are tiles in raster order and, last, a view of the whole (InternVL, SmolVLM); the families
    choose the grid of tiles whose shape is closest to the image's, and so does this.
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


def seen(image: Image.Image, image_processor: object) -> Image.Image:
    """The part of an image that the encoder sees: LLaVA-1.5's processor cuts out the centre.

    LLaVA-NeXT's has the same setting, but cuts tiles, which are square before.
    """
    cuts = getattr(image_processor, "do_center_crop", False)
    if not cuts or hasattr(image_processor, "image_grid_pinpoints"):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def covered(
    outline: Sequence[tuple[float, float]],
    planes: Sequence[VisualTokens],
    boxes: Sequence[Box],
) -> list[np.ndarray]:
    """For each plane, whether an outline of (x, y) fractions covers each token: [N] bool.

    A token counts from a quarter of its patch on; the best-covered one of a plane always does, so
    nothing is too small to be found.
    """
    raster = Image.new("L", (_RASTER, _RASTER))
    corners = [(x * _RASTER, y * _RASTER) for x, y in outline]
    ImageDraw.Draw(raster).polygon(corners, fill=1)
    shares_of = raster.convert("F")
    masks = []
    for plane, box in zip(planes, boxes, strict=True):
        rows, columns = plane.grid
        left, top, right, bottom = (side * _RASTER for side in box)
        patches = shares_of.resize(
            (columns, rows), Image.Resampling.BOX, box=(left, top, right, bottom)
        )
        shares = np.asarray(patches)
        row_N, column_N = plane.coords_N2.cpu().numpy().T
        share_N = shares[row_N, column_N]
        masks.append((share_N > 0) & (share_N >= min(_COVERED, share_N.max())))
    return masks
