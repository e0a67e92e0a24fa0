"""Batches of images tiled by their size (LLaVA-NeXT, LLaVA-OneVision)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.sppruner.families.base import left_padded, prompts


def tiled_batch(
    images_per_row: Sequence[int],
    *,
    sizes: Mapping[tuple[int, int], tuple[int, int]],
    image_id: int,
    tile: int,
    seed: int,
) -> dict[str, Tensor]:
    """Prompts whose images are all cut into tiles, as the processors do with a flat list of images.

    sizes: (height, width) of the images, used in turn → (tiles, visual tokens). tile: side of a
    tile in pixels.
    """
    total = sum(images_per_row)
    used = [list(sizes)[i % len(sizes)] for i in range(total)]
    runs = iter([[image_id] * sizes[size][1] for size in used])
    rows = prompts([[next(runs) for _ in range(count)] for count in images_per_row], seed=seed)
    inputs = left_padded(rows)
    if total:
        generator = torch.Generator().manual_seed(seed)
        counts = [sizes[size][0] for size in used]
        # Images with fewer tiles are padded with zeros.
        pixels = torch.zeros(total, max(counts), 3, tile, tile)
        for image, count in enumerate(counts):
            pixels[image, :count] = torch.randn(count, 3, tile, tile, generator=generator)
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(used)}
    return inputs
