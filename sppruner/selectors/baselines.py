"""Baselines: random tokens, tokens spread evenly over the grid, and the most salient tokens.

Shapes: I planes that are selected together, N tokens of each plane, K kept tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.errors import SpecError
from sppruner.selectors.base import Selector
from sppruner.selectors.options import SaliencyOption
from sppruner.selectors.saliency import saliency_IN
from sppruner.signals import CONTENT_SEED
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class RandomSelector(Selector):
    """Uniformly random tokens; each image has its own draw, a function of its pixels and `seed`."""

    name: ClassVar[str] = "random"

    seed: int = 0
    """Seed of the draw, 0 to 65,535."""

    def __post_init__(self) -> None:
        # CONTENT_SEED takes the higher bits.
        if not 0 <= self.seed < 2**16:
            raise SpecError(f"seed {self.seed!r} is outside 0 to 65535")

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({CONTENT_SEED})

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        selections = []
        for image, k in zip(images, counts, strict=True):
            generator = torch.Generator().manual_seed(
                (int(image.signals[CONTENT_SEED]) << 16) ^ self.seed
            )
            order_N = torch.randperm(image.count, generator=generator)
            index_K = order_N[:k].sort().values.to(image.features_ND.device)
            selections.append(Selection(index_K=index_K))
        return selections


@functools.lru_cache(maxsize=256)
def _spread(rows: int, columns: int, k: int) -> tuple[tuple[int, int], ...]:
    """The first k distinct cells of the R2 low-discrepancy sequence on a rows × columns grid.

    Every prefix covers the grid evenly; a stride over raster order does not if it shares a factor
    with the grid's width (M. Roberts, "The unreasonable effectiveness of quasirandom sequences",
    2018).
    """
    plastic = 1.32471795724474602596
    cells: dict[tuple[int, int], None] = {}
    step = 0
    while len(cells) < k:
        step += 1
        row = int((0.5 + step / plastic) % 1.0 * rows)
        column = int((0.5 + step / plastic**2) % 1.0 * columns)
        cells.setdefault((row, column))
    return tuple(cells)


@dataclass(frozen=True, kw_only=True)
class GridSelector(Selector):
    """Tokens spread evenly over the grid, independent of the image's content."""

    name: ClassVar[str] = "grid"

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        selections = []
        for image, k in zip(images, counts, strict=True):
            rows, columns = image.grid
            if rows * columns != image.count:
                raise SpecError("method 'grid' needs images whose tokens fill a rectangle")
            cells = torch.tensor(_spread(rows, columns, k), device=image.features_ND.device)
            flat_K = cells[:, 0] * columns + cells[:, 1]
            position_N = image.coords_N2[:, 0] * columns + image.coords_N2[:, 1]
            index_K = torch.isin(position_N, flat_K).nonzero().squeeze(1)
            selections.append(Selection(index_K=index_K))
        return selections


@dataclass(frozen=True, kw_only=True)
class TopKSelector(SaliencyOption):
    """The k most salient tokens."""

    name: ClassVar[str] = "topk"

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        # Stable, so that ties resolve to raster order on every device.
        saliency: Tensor = saliency_IN(images, self.saliency)
        order_IN = saliency.argsort(dim=1, descending=True, stable=True)
        return [Selection(index_K=order_IN[i, :k].sort().values) for i, k in enumerate(counts)]
