"""Average pooling to exactly k tokens: the baseline that keeps a little of everything.

The grid is cut into b bands of rows, as equal as whole rows allow, and each band into cells by
columns; b is the whole number closest to sqrt(k · rows / columns), at which cells are square. The k
cells are shared among the bands as evenly as whole cells allow, so cells differ a little in size
unless the grid divides evenly. Each cell is kept as the token nearest its centre, the upper left of
equals, which carries the mean of the cell's projected features.

With k = ⌈rows/2⌉ · ⌈columns/2⌉ on an even grid it is 2 × 2 average pooling.
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
    """Has no options."""

    name: ClassVar[str] = "pool"

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        rows, columns = images[0].grid
        selections = []
        for image, k in zip(images, counts, strict=True):
            cells = sorted(_cells(rows, columns, k))
            centres, members = zip(*cells, strict=True)
            device, most = image.features_ND.device, max(map(len, members))
            # Short cells are filled up with tokens of no weight; sums then run in one order
            # on every device.
            padded_KM = torch.tensor([cell + cell[:1] * (most - len(cell)) for cell in members])
            size_K1 = torch.tensor([[len(cell)] for cell in members])
            weight_KM = (torch.arange(most) < size_K1) / size_K1
            values_KMD = image.features_ND[padded_KM.to(device)].float()
            mean_KD = (values_KMD * weight_KM.to(device)[:, :, None]).sum(dim=1)
            selections.append(
                Selection(
                    index_K=torch.tensor(centres, device=device),
                    replace_KD=mean_KD.to(image.features_ND.dtype),
                )
            )
        return selections

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """One multiplication and one addition for every value."""
        return 2 * tokens * width


def _bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """[0, length) cut into parts as equal as whole steps allow."""
    cuts = [length * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(cuts))


@functools.lru_cache(maxsize=256)
def _cells(rows: int, columns: int, k: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(token nearest the centre, tokens) of each of k cells that together tile the grid."""
    square = round(math.sqrt(k * rows / columns))
    bands = min(max(square, -(-k // columns)), rows, k)
    cells = []
    for (top, bottom), (first, last) in zip(_bounds(rows, bands), _bounds(k, bands), strict=True):
        for left, right in _bounds(columns, last - first):
            centre = (top + bottom - 1) // 2 * columns + (left + right - 1) // 2
            inside = [r * columns + c for r in range(top, bottom) for c in range(left, right)]
            cells.append((centre, tuple(inside)))
    return tuple(cells)
