"""LLaVA-1.5: 16 visual tokens per image, a CLS token, grouped-query attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    set_seed,
)

from tests.sppruner.families.base import TEXT, VISION, Family, enlarge, left_padded, prompts

IMAGE = 5
SIDE, PATCH = 4, 4
TOKENS = SIDE * SIDE


def build(
    attention: str = "sdpa", *, feature_layer: int = -2, seed: int = 0
) -> LlavaForConditionalGeneration:
    set_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **VISION, image_size=SIDE * PATCH, patch_size=PATCH, projection_dim=32
        ),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        attn_implementation=attention,
    )
    return enlarge(LlavaForConditionalGeneration(config))


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    rows = [[[IMAGE] * TOKENS] * count for count in images_per_row]
    inputs = left_padded(prompts(rows, seed=seed))
    if total := sum(images_per_row):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(total, 3, SIDE * PATCH, SIDE * PATCH, generator=generator)
        inputs["pixel_values"] = pixels
    return inputs


FAMILY = Family(name="llava", build=build, batch=batch, image_id=IMAGE)
