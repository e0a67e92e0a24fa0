"""Average pooling tiles any grid in exactly k cells and keeps their means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppruner.selectors.pool import _cells
from tests.sppruner.selectors.images import choose, make


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_cells_are_rectangles_that_tile_the_grid_and_hold_their_centres(
    rows: int, columns: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, rows * columns))
    cells = _cells(rows, columns, k)
    assert len(cells) == k
    assert sorted(i for _, inside in cells for i in inside) == list(range(rows * columns))
    for centre, inside in cells:
        at = [(i // columns, i % columns) for i in inside]
        tall, wide = (max(p) - min(p) + 1 for p in zip(*at, strict=True))
        assert len(inside) == tall * wide
        middle = [(min(p) + max(p)) / 2 for p in zip(*at, strict=True)]
        apart = {
            i: (i // columns - middle[0]) ** 2 + (i % columns - middle[1]) ** 2 for i in inside
        }
        assert centre == min(inside, key=lambda i: apart[i])


@given(side=st.integers(2, 24), data=st.data())
def test_cells_of_a_square_grid_are_nearly_square_and_nearly_equal(
    side: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, side * side // 2))
    sizes = [len(inside) for _, inside in _cells(side, side, k)]
    assert max(sizes) <= 4 * side * side / k
    assert min(sizes) >= side * side / k / 4


def test_each_kept_token_carries_the_mean_of_its_cell() -> None:
    image = make(7, 10)
    chosen = choose("pool", [image], [12])[0]
    means = {
        centre: image.features_ND[list(inside)].mean(dim=0) for centre, inside in _cells(7, 10, 12)
    }
    assert chosen.index_K.tolist() == sorted(means)
    wanted = torch.stack([means[i] for i in sorted(means)])
    torch.testing.assert_close(chosen.replace_KD, wanted)


@pytest.mark.parametrize("side", [2, 4])
def test_where_cells_divide_the_grid_it_is_torchs_average_pooling(side: int) -> None:
    image = make(8, 12)
    chosen = choose("pool", [image], [96 // side**2])[0]
    grid = image.features_ND.T.reshape(1, 16, 8, 12)
    pooled = torch.nn.functional.avg_pool2d(grid, side)[0].flatten(1).T
    torch.testing.assert_close(chosen.replace_KD, pooled)
