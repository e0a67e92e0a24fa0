"""LLaVA-NeXT: a low-resolution view of 16 tokens and up to four high-resolution tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    set_seed,
)

from tests.sppruner.families.base import (
    BOS,
    EOS,
    PAD,
    Family,
    enlarge,
    left_padded,
    prompts,
)

IMAGE = 5
SIDE, TILE = 4, 16
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
# (height, width) of the images in turn → (tiles, visual tokens), as the processor counts them.
SIZES = {
    (40, 25): (5, 72),
    (16, 64): (4, 68),
    (7, 5): (3, 28),
    (20, 33): (5, 52),
    (30, 30): (5, 88),
}


def build(attention: str = "sdpa", *, seed: int = 0, feature_layer: int = -2) -> Any:
    set_seed(seed)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=TILE // SIDE,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=feature_layer,
        attn_implementation=attention,
    )
    return enlarge(LlavaNextForConditionalGeneration(config))


def tiled_pixels(tiles: Sequence[int], side: int, generator: torch.Generator) -> Tensor:
    """[I, most tiles, 3, side, side]: images stacked, filled up with zero tiles."""
    pixels = torch.zeros(len(tiles), max(tiles), 3, side, side)
    for image, count in enumerate(tiles):
        pixels[image, :count] = torch.randn(count, 3, side, side, generator=generator)
    return pixels


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    total = sum(images_per_row)
    sizes = [list(SIZES)[i % len(SIZES)] for i in range(total)]
    runs = iter([[IMAGE] * SIZES[size][1] for size in sizes])
    rows = prompts([[next(runs) for _ in range(count)] for count in images_per_row], seed=seed)
    inputs = left_padded(rows)
    if total:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = tiled_pixels([SIZES[s][0] for s in sizes], TILE, generator)
        inputs["image_sizes"] = torch.tensor(sizes)
    return inputs


FAMILY = Family(name="llava_next", build=build, batch=batch, image_id=IMAGE)
