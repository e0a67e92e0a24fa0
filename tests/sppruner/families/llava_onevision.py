"""LLaVA-OneVision: a low-resolution view of 16 tokens and a grid of tiles, pooled beyond two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
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
from tests.sppruner.families.llava_next import tiled_pixels

IMAGE, VIDEO = 5, 6
SIDE, TILE = 4, 16
PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32], [48, 16], [16, 48], [48, 48], [32, 48]]
# (height, width) of the images in turn → (tiles, visual tokens), as the processor counts them:
# pooled; unpadded to a strip; pooled after unpadding; one tile beside the view.
SIZES = {(48, 48): (10, 46), (13, 64): (4, 42), (40, 20): (10, 56), (7, 5): (2, 28)}


def build(attention: str = "sdpa", *, seed: int = 0, feature_layer: int = -1) -> Any:
    set_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=TILE // SIDE,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
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
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_layer=feature_layer,
        attn_implementation=attention,
    )
    return enlarge(LlavaOnevisionForConditionalGeneration(config))


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    """Every image is cut into tiles, as the processor does with a flat list of images."""
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


FAMILY = Family(name="llava_onevision", build=build, batch=batch, image_id=IMAGE)
