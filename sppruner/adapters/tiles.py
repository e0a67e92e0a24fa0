"""Tools for families that cut an image into square tiles.

Shapes: T tiles, P patches of a tile, N tokens of a tile, C channels, D width of the language model,
V width of the hidden states of a token, B batch rows, S prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sppruner.adapters.base import EncodedImage, Tensors, TowerOutput, raster
from sppruner.cost import ImageShape
from sppruner.signals import CONTENT_SEED, content_seed
from sppruner.types import VisualTokens


def layer_of_state(layers: nn.ModuleList, index: int) -> Any:
    """The layer whose output is hidden state `index`; state 0 is the embeddings, −1 the last.

    Saliency is read at the depth of the features, as in VisionZip and others.
    """
    return layers[index if index < 0 else index - 1]


def stacked(tensors: Tensors) -> Tensor:
    """One tensor [T, …] of tensors of one shape, copied only where they are not one already."""
    return tensors if isinstance(tensors, Tensor) else torch.stack(list(tensors))


def stack_signals(by_tile: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The signals of tiles, by name: [T, P] or [T, P, C]."""
    return {name: torch.stack([signals[name] for signals in by_tile]) for name in by_tile[0]}


def find_runs(mask_BS: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, stop) of each run of consecutive True entries, row by row."""
    edges = torch.nn.functional.pad(mask_BS.to(torch.int8), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    return [
        (row, start, stop)
        for (row, start), (_, stop) in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def group_patches(values_TPC: Tensor, factor: int) -> Tensor:
    """[T, P / factor², factor², C]: the patches of each token, both in raster order.

    The families' pixel shuffles concatenate exactly these states into a token.
    """
    tiles, patches, width = values_TPC.shape
    side = math.isqrt(patches) // factor
    grid = values_TPC.reshape(tiles, side, factor, side, factor, width).transpose(2, 3)
    return grid.reshape(tiles, side * side, factor * factor, width)


def average_patch_signal(values: Tensor, factor: int) -> Tensor:
    """A token signal from a patch signal [T, P] or [T, P, C]: the mean over each token's
    patches."""
    values_TPC = values if values.dim() == 3 else values[..., None]
    mean_TNC = group_patches(values_TPC, factor).mean(dim=2)
    return mean_TNC if values.dim() == 3 else mean_TNC[..., 0]


def owners_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """(row, index in row) of images in prompt order, from the row of each."""
    counts: dict[int, int] = {}
    owners = []
    for row in rows:
        owners.append((row, counts.get(row, 0)))
        counts[row] = owners[-1][1] + 1
    return owners


def tiled_images(
    tower: TowerOutput,
    owners: Sequence[tuple[int, int]],
    shapes: Sequence[ImageShape],
    signals: frozenset[str],
    *,
    factor: int,
) -> tuple[EncodedImage, ...]:
    """Images whose runs are the tokens of their tiles one after the other; each tile is a plane.

    factor: patches along the side of a token.
    """
    hidden_TNV = group_patches(stacked(tower.states), factor).flatten(2)
    count = hidden_TNV.shape[1]
    side = math.isqrt(count)
    coords_N2 = raster(side, side, hidden_TNV.device)
    tile_signals = {
        name: average_patch_signal(values, factor)
        for name, values in stack_signals(tower.signals).items()
    }
    images: list[EncodedImage] = []
    first = 0
    for run_ND, (row, image), shape in zip(tower.runs, owners, shapes, strict=True):
        index_N = torch.arange(shape.tokens, device=run_ND.device)
        features = run_ND.view(shape.tiles, count, -1)
        planes = []
        for tile in range(first, first + shape.tiles):
            available = {name: values[tile] for name, values in tile_signals.items()}
            if CONTENT_SEED in signals:
                available[CONTENT_SEED] = content_seed(tower.pixels[tile])
            planes.append(
                VisualTokens(
                    features_ND=features[tile - first],
                    hidden_NV=hidden_TNV[tile],
                    coords_N2=coords_N2,
                    signals={name: available[name] for name in signals},
                    row=row,
                    image=image,
                    plane=tile - first,
                )
            )
        images.append(
            EncodedImage(
                row=row,
                image=image,
                run_ND=run_ND,
                planes=tuple(planes),
                places=index_N.view(-1, count).unbind(),
                shape=shape,
            )
        )
        first += shape.tiles
    return tuple(images)
