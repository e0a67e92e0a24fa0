"""Where the tokens of an any-resolution image lie: geometry alone, known before the model runs.

Shapes: T tiles, P patches of a tile, C channels, N tokens of a plane.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from sppruner.cost import ImageShape
from sppruner.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyresLayout:
    """How the tokens of one image follow from its tiles."""

    side: int
    """Patches along a tile's side."""

    grid: tuple[int, int] = (0, 0)
    """(rows, columns) of high-resolution tiles; (0, 0) if there is only the low-resolution view."""

    crop: tuple[int, int] = (0, 0)
    """(top, left) of the image on the padded grid, in patches."""

    unpadded: tuple[int, int] = (0, 0)
    """(rows, columns) of the image on the padded grid, in patches."""

    size: tuple[int, int] = (0, 0)
    """(rows, columns) of tokens after pooling; `unpadded` without pooling."""

    @classmethod
    def for_image(
        cls,
        image_size: Sequence[int],
        *,
        pinpoints: Any,
        tile: int,
        side: int,
        most_tiles: int | None = None,
    ) -> AnyresLayout:
        """The layout of an image of (height, width) pixels.

        pinpoints: the resolutions that the processor chooses from. tile: pixels along a tile's
        side. most_tiles: a grid with clearly more tokens than this many tiles is pooled to about as
        many; the bound and its slack of 1.1 are the model's. None: no pooling.
        """
        height, width = image_size
        best = select_best_resolution((height, width), pinpoints)
        grid = best[0] // tile, best[1] // tile
        rows, columns = grid[0] * side, grid[1] * side
        top = left = 0
        # The processor pads the image to the grid's aspect ratio; int(round(…, 7)) is the model's
        # own arithmetic for the padding.
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            left = (columns - int(round(width * (rows / height), 7))) // 2
        unpadded = size = rows - 2 * top, columns - 2 * left
        if most_tiles is not None:
            ratio = math.sqrt(unpadded[0] * unpadded[1] / (most_tiles * side**2))
            if ratio > 1.1:
                size = int(unpadded[0] // ratio), int(unpadded[1] // ratio)
        return cls(side=side, grid=grid, crop=(top, left), unpadded=unpadded, size=size)

    @property
    def tiles(self) -> int:
        """Tiles that the tower encodes, the low-resolution view included."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Visual tokens in the prompt, newlines included."""
        rows, columns = self.size
        newlines = 1 if self.tiles == 1 else rows
        return self.side**2 + rows * columns + newlines

    def shape(self) -> ImageShape:
        """The encoder's input, for the cost model."""
        return ImageShape(tiles=self.tiles, rows=self.side, columns=self.side, tokens=self.tokens)

    def places(self, device: torch.device) -> list[Tensor]:
        """For each plane, the indices of its tokens in the run."""
        base = self.side**2
        places = [torch.arange(base, device=device)]
        rows, columns = self.size
        if rows * columns:
            row = torch.arange(rows, device=device)[:, None] * (columns + 1)
            column = torch.arange(columns, device=device)
            places.append((base + row + column).flatten())
        return places

    def assemble(self, values_TPC: Tensor) -> Tensor:
        """[rows · columns, C] values of the high-resolution plane from its tiles' values [T, P, C],
        by the same reshapes, crop and bilinear pooling as the model's features."""
        width = values_TPC.shape[-1]
        grid = values_TPC.reshape(*self.grid, self.side, self.side, width)
        whole = grid.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
        (top, left), (rows, columns) = self.crop, self.unpadded
        crop = whole[:, top : top + rows, left : left + columns]
        if self.size != self.unpadded:
            crop = torch.nn.functional.interpolate(crop[None], list(self.size), mode="bilinear")[0]
        return crop.flatten(1).T


def image_sizes(inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """(height, width) in pixels of each image before tiling. Raises InputError if missing."""
    if "image_sizes" not in inputs:
        raise InputError(
            "image_sizes is missing: pass on everything the processor returns, pixel_values alone "
            "do not determine how an image was cut into tiles"
        )
    return [(height, width) for height, width in inputs["image_sizes"].tolist()]
