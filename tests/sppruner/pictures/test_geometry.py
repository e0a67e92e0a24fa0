"""Where tokens lie in the image: boxes of planes, and tokens under an outline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sppruner.adapters.base import raster
from sppruner.pictures.geometry import WHOLE, covered, plane_boxes, seen
from sppruner.types import VisualTokens


def plane(rows: int, columns: int) -> VisualTokens:
    return VisualTokens(
        features_ND=torch.zeros(rows * columns, 2),
        hidden_NV=None,
        coords_N2=raster(rows, columns, torch.device("cpu")),
        signals={},
    )


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_planes_are_views_of_the_whole(count: int) -> None:
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
def test_tiles_take_the_grid_closest_to_the_image(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """Six tiles and a view of the whole; wide images lie in wide grids."""
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
    (mask_N,) = covered([(0.5, 0.5), (1, 0.5), (1, 1), (0.5, 1)], [plane(4, 6)], [WHOLE])
    expected = np.zeros((4, 6), dtype=bool)
    expected[2:, 3:] = True
    assert (mask_N.reshape(4, 6) == expected).all()


def test_something_tiny_is_still_covered_by_one_token() -> None:
    (mask_N,) = covered([(0.1, 0.1), (0.11, 0.1), (0.11, 0.11)], [plane(4, 4)], [WHOLE])
    assert mask_N.nonzero()[0].tolist() == [0]


def test_a_tile_that_an_outline_misses_is_not_covered() -> None:
    left = (0.0, 0.0, 0.5, 1.0)
    right = (0.5, 0.0, 1.0, 1.0)
    corners = [(0.6, 0.1), (0.9, 0.1), (0.9, 0.9), (0.6, 0.9)]
    missed, hit = covered(corners, [plane(2, 2)] * 2, [left, right])
    assert not missed.any()
    assert hit.all()


def test_a_processor_that_cuts_out_the_centre_sees_only_that() -> None:
    class Cuts:
        do_center_crop = True

    class Tiles(Cuts):
        image_grid_pinpoints = ((16, 16),)

    image = Image.new("RGB", (60, 40))
    image.paste("red", (10, 0, 50, 40))
    assert seen(image, object()) is seen(image, Tiles()) is image
    view = seen(image, Cuts())
    assert view.size == (40, 40)
    assert view.getcolors() == [(1600, (255, 0, 0))]
