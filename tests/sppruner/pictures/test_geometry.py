"""Positions of tokens in the image: boxes of planes, and tokens covered by an outline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sppruner.adapters.base import raster
from sppruner.pictures.geometry import WHOLE, covered_tokens, plane_boxes, visible_crop
from sppruner.types import VisualTokens


def plane(rows: int, columns: int) -> VisualTokens:
    return VisualTokens(
        features_ND=torch.zeros(rows * columns, 2),
        hidden_NV=None,
        coords_N2=raster(rows, columns, torch.device("cpu")),
        signals={},
    )


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_planes_are_views_of_the_whole_image(count: int) -> None:
    assert plane_boxes([plane(4, 4)] * count, (30, 20)) == [WHOLE] * count


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((600, 100), (1, 6)),
        ((300, 200), (2, 3)),
        ((200, 300), (3, 2)),
        ((100, 600), (6, 1)),
    ],
)
def test_tiles_form_the_grid_of_the_closest_aspect_ratio(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """Six tiles and a view of the whole image; a wide image has a wide grid."""
    boxes = plane_boxes([plane(4, 4)] * 7, size)
    rows, columns = grid
    assert boxes[-1] == WHOLE
    assert boxes[0] == (0, 0, 1 / columns, 1 / rows)
    assert boxes[5] == ((columns - 1) / columns, (rows - 1) / rows, 1, 1)
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in boxes[:6]) == (
        pytest.approx(1)
    )


def test_an_outline_covers_the_tokens_under_it() -> None:
    """The lower right quarter of the image on a grid of four by six."""
    (mask_N,) = covered_tokens([(0.5, 0.5), (1, 0.5), (1, 1), (0.5, 1)], [plane(4, 6)], [WHOLE])
    expected = np.zeros((4, 6), dtype=bool)
    expected[2:, 3:] = True
    assert (mask_N.reshape(4, 6) == expected).all()


def test_an_outline_smaller_than_a_patch_covers_one_token() -> None:
    (mask_N,) = covered_tokens([(0.1, 0.1), (0.11, 0.1), (0.11, 0.11)], [plane(4, 4)], [WHOLE])
    assert mask_N.nonzero()[0].tolist() == [0]


def test_an_outline_covers_no_token_of_a_tile_outside_it() -> None:
    left = (0.0, 0.0, 0.5, 1.0)
    right = (0.5, 0.0, 1.0, 1.0)
    corners = [(0.6, 0.1), (0.9, 0.1), (0.9, 0.9), (0.6, 0.9)]
    missed, hit = covered_tokens(corners, [plane(2, 2)] * 2, [left, right])
    assert not missed.any()
    assert hit.all()


def test_the_visible_crop_is_the_centre_square_of_a_cropping_processor() -> None:
    class Crops:
        do_center_crop = True

    class Tiles(Crops):
        image_grid_pinpoints = ((16, 16),)

    image = Image.new("RGB", (60, 40))
    image.paste("red", (10, 0, 50, 40))
    assert visible_crop(image, object()) is visible_crop(image, Tiles()) is image
    view = visible_crop(image, Crops())
    assert view.size == (40, 40)
    assert view.getcolors() == [(1600, (255, 0, 0))]
