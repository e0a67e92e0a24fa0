"""InternVL: images of one to three tiles, 16 tokens of 2×2 patches per tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
    set_seed,
)

from tests.sppruner.families.base import (
    TEXT,
    VISION,
    Family,
    enlarge,
    left_padded,
    prompts,
)

IMAGE, START, END = 5, 6, 7
SIDE, TILE = 8, 32
TOKENS = (SIDE // 2) ** 2
TILES = [3, 1, 2]
"""Tiles of the images, used in turn."""


def build(attention: str = "sdpa", *, seed: int = 0, **options: Any) -> Any:
    set_seed(seed)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **VISION,
            image_size=TILE,
            patch_size=TILE // SIDE,
        ),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        attn_implementation=attention,
        **options,
    )
    model = InternVLForConditionalGeneration(config)
    # Both are initialised to zero, which leaves patches without position and the CLS token without
    # a query.
    embeddings = model.model.vision_tower.embeddings
    torch.nn.init.normal_(embeddings.position_embeddings)
    torch.nn.init.normal_(embeddings.cls_token)
    return enlarge(model)


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    tiles = [TILES[i % len(TILES)] for i in range(sum(images_per_row))]
    run = iter([[START, *[IMAGE] * (TOKENS * count), END] for count in tiles])
    rows = prompts([[next(run) for _ in range(count)] for count in images_per_row], seed=seed)
    inputs = left_padded(rows)
    if tiles:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(sum(tiles), 3, TILE, TILE, generator=generator)
    return inputs


FAMILY = Family(name="internvl", build=build, batch=batch, image_id=IMAGE)
