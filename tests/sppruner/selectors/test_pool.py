"""Average pooling tiles any grid in exactly k cells and keeps their means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppruner.selectors.pool import _bands
from tests.sppruner.selectors.images import choose, make


def cells_of(rows: int, columns: int, k: int) -> list[list[int]]:
    """The tokens of each cell."""
    return [
        [r * columns + c for r in range(top, bottom) for c in range(left, right)]
        for top, bottom, cells in _bands(rows, columns, k)
        for left, right in cells
    ]


def centre_of(inside: list[int], columns: int) -> int:
    """The token of a cell that is nearest its middle, the first on ties."""
    at = {i: (i // columns, i % columns) for i in inside}
    row, column = ((min(p) + max(p)) / 2 for p in zip(*at.values(), strict=True))
    return min(inside, key=lambda i: (at[i][0] - row) ** 2 + (at[i][1] - column) ** 2)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_cells_are_rectangles_that_tile_the_grid(
    rows: int, columns: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, rows * columns))
    cells = cells_of(rows, columns, k)
    assert len(cells) == k
    assert all(cells)
    assert sorted(i for inside in cells for i in inside) == list(range(rows * columns))


@given(side=st.integers(2, 24), data=st.data())
def test_cells_of_a_square_grid_are_nearly_square_and_nearly_equal(
    side: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, side * side // 2))
    sizes = [len(inside) for inside in cells_of(side, side, k)]
    assert max(sizes) <= 4 * side * side / k
    assert min(sizes) >= side * side / k / 4


@pytest.mark.parametrize(("rows", "columns", "k"), [(7, 10, 12), (5, 3, 14), (1, 9, 4), (4, 4, 1)])
def test_the_token_nearest_a_cells_middle_carries_the_cells_mean(
    rows: int, columns: int, k: int
) -> None:
    image = make(rows, columns)
    chosen = choose("pool", [image], [k])[0]
    cells = {centre_of(inside, columns): inside for inside in cells_of(rows, columns, k)}
    assert chosen.index_K.tolist() == sorted(cells)
    means = [image.features_ND[cells[i]].mean(dim=0) for i in sorted(cells)]
    torch.testing.assert_close(chosen.replace_KD, torch.stack(means))


@pytest.mark.parametrize("side", [2, 4])
def test_where_cells_divide_the_grid_it_is_torchs_average_pooling(side: int) -> None:
    image = make(8, 12)
    chosen = choose("pool", [image], [96 // side**2])[0]
    grid = image.features_ND.T.reshape(1, 16, 8, 12)
    pooled = torch.nn.functional.avg_pool2d(grid, side)[0].flatten(1).T
    torch.testing.assert_close(chosen.replace_KD, pooled)
