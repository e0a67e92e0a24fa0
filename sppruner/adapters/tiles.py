"""Tools of families that cut an image into square tiles: T tiles of P patches each, merged M to a
token where the projector merges patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sppruner.adapters.base import EncodedImage, raster
from sppruner.cost import ImageShape
from sppruner.signals import CONTENT_SEED, content_seed
from sppruner.types import VisualTokens


class TileProbe(Protocol):
    """A probe that can say what it read of one tile."""

    def signals(self, image: int) -> dict[str, Tensor]: ...


def layer_before(layers: nn.ModuleList, index: int) -> nn.Module:
    """The layer whose output is hidden state `index`: state 0 is the embeddings, -1 the last.

    Saliency is read at the depth of the features (pruners such as VisionZip do the same).
    """
    return layers[index if index < 0 else index - 1]


def read(probe: TileProbe, tiles: range) -> dict[str, Tensor]:
    """What a probe read of some tiles, by signal name: [T, P] or [T, P, C]."""
    each = [probe.signals(tile) for tile in tiles]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def runs(mask_BS: Tensor) -> list[tuple[int, int]]:
    """(row, length) of each unbroken run of True, in reading order."""
    edges = torch.nn.functional.pad(mask_BS.to(torch.int8), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    lengths = ends[:, 1] - starts[:, 1]
    return list(zip(starts[:, 0].tolist(), lengths.tolist(), strict=True))


def merged(values_TPC: Tensor, factor: int) -> Tensor:
    """[T, P / factor², factor², C]: the patches behind each token, both in raster order.

    The families' pixel shuffles concatenate exactly these states to a token.
    """
    tiles, patches, width = values_TPC.shape
    side = math.isqrt(patches) // factor
    grid = values_TPC.reshape(tiles, side, factor, side, factor, width).transpose(2, 3)
    return grid.reshape(tiles, side * side, factor * factor, width)


def merged_signals(signals: Mapping[str, Tensor], factor: int) -> dict[str, Tensor]:
    """Signals of patches as signals of tokens: the mean over the patches merged into each."""
    return {
        name: merged(values[..., None], factor).mean(dim=2)[..., 0]
        if values.dim() == 2
        else merged(values, factor).mean(dim=2)
        for name, values in signals.items()
    }


def tiled_image(
    *,
    row: int,
    image: int,
    features_TND: Tensor,
    hidden_TNV: Tensor,
    pixels: Sequence[Tensor],
    read: Mapping[str, Tensor],
    signals: frozenset[str],
    shape: ImageShape,
) -> EncodedImage:
    """An image whose run is its tiles' tokens one after the other: each tile is a plane."""
    tiles, count = features_TND.shape[:2]
    side = math.isqrt(count)
    device = features_TND.device
    coords_N2 = raster(side, side, device)
    planes = []
    for tile in range(tiles):
        known = {name: values[tile] for name, values in read.items()}
        if CONTENT_SEED in signals:
            known[CONTENT_SEED] = content_seed(pixels[tile])
        planes.append(
            VisualTokens(
                features_ND=features_TND[tile],
                hidden_NV=hidden_TNV[tile],
                coords_N2=coords_N2,
                signals={name: known[name] for name in signals},
                row=row,
                image=image,
                plane=tile,
            )
        )
    return EncodedImage(
        row=row,
        image=image,
        run_ND=features_TND.flatten(0, 1),
        planes=tuple(planes),
        places=torch.arange(tiles * count, device=device).split(count),
        shape=shape,
    )
