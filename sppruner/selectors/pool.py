"""Average pooling of the grid to exactly k tokens: a baseline that covers the whole image.

The grid is cut into b bands of rows, as equal as whole rows allow, and each band into cells by
columns; b is the whole number closest to sqrt(k · rows / columns), at which cells are square. The k
cells are shared among the bands as evenly as whole cells allow, so cells differ a little in size
unless the grid divides evenly. Each cell is kept as the token nearest its centre, the upper left
one on ties, which carries the mean of the cell's projected features.

With k = ⌈rows/2⌉ · ⌈columns/2⌉ on an even grid this is 2 × 2 average pooling.

Shapes: R rows and C columns of the grid, D width of the features, Q cells of a band, K kept tokens;
`summed_CD` holds the sums over a band's rows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sppruner.selectors.base import Selector
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class PoolSelector(Selector):
    """Averages of k cells that tile the grid; no options."""

    name: ClassVar[str] = "pool"

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        rows, columns = images[0].grid
        selections = []
        for image, k in zip(images, counts, strict=True):
            features_ND = image.features_ND
            grid_RCD = features_ND.view(rows, columns, -1)
            centres, means = [], []
            for top, bottom, cells in _bands(rows, columns, k):
                centres += [
                    (top + bottom - 1) // 2 * columns + (left + right - 1) // 2
                    for left, right in cells
                ]
                share_QC = torch.zeros(len(cells), columns)
                for q, (left, right) in enumerate(cells):
                    share_QC[q, left:right] = 1 / ((bottom - top) * (right - left))
                summed_CD = grid_RCD[top:bottom].float().sum(dim=0)
                means.append(share_QC.to(features_ND.device) @ summed_CD)
            selections.append(
                Selection(
                    index_K=torch.tensor(centres, device=features_ND.device),
                    replace_KD=torch.cat(means).to(features_ND.dtype),
                )
            )
        return selections

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """One addition per feature value, and the products that average each cell's columns."""
        return tokens * width + 2 * round(math.sqrt(tokens)) * kept * width


def _bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of `parts` intervals that divide [0, length) as equally as whole steps
    allow."""
    cuts = [length * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(cuts))


@functools.lru_cache(maxsize=256)
def _bands(
    rows: int, columns: int, k: int
) -> tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]:
    """(top, bottom, (left, right) of each cell) of each band, for k cells that tile the grid."""
    square = round(math.sqrt(k * rows / columns))
    count = min(max(square, -(-k // columns)), rows, k)
    return tuple(
        (top, bottom, tuple(_bounds(columns, last - first)))
        for (top, bottom), (first, last) in zip(
            _bounds(rows, count), _bounds(k, count), strict=True
        )
    )
