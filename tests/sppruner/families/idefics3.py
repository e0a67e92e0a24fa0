"""Idefics3 and SmolVLM: images of one or three tiles, 16 tokens of 2×2 patches per tile, with the
processor's text tokens between the tiles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
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

IMAGE, FRAME, GLOBAL, LINE, FIRST, SECOND = 5, 6, 7, 8, 9, 10
SIDE, TILE = 8, 32
TOKENS = (SIDE // 2) ** 2
TILES = [3, 1]
"""Tiles of the images, used in turn."""

_MODELS = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}


def build(attention: str = "sdpa", *, seed: int = 0, name: str = "idefics3") -> Any:
    set_seed(seed)
    config_class, model_class = _MODELS[name]
    config = config_class(
        vision_config={
            **VISION,
            "image_size": TILE,
            "patch_size": TILE // SIDE,
        },
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        attn_implementation=attention,
    )
    return enlarge(model_class(config))


def image_ids(tiles: int) -> list[int]:
    """The ids that the processor writes for an image: one tile, or two and a view of the whole."""
    whole = [FRAME, GLOBAL, *[IMAGE] * TOKENS, FRAME]
    if tiles == 1:
        return whole
    left, right = ([FRAME, tag, *[IMAGE] * TOKENS] for tag in (FIRST, SECOND))
    return [*left, *right, LINE, LINE, *whole]


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    tiles = iter(TILES * sum(images_per_row))
    per_row = [[next(tiles) for _ in range(count)] for count in images_per_row]
    runs = [[image_ids(count) for count in row] for row in per_row]
    inputs = left_padded(prompts(runs, seed=seed, first_word=11))
    if most := max(map(sum, per_row), default=0):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.zeros(len(per_row), most, 3, TILE, TILE)
        mask = torch.zeros(len(per_row), most, TILE, TILE, dtype=torch.int64)
        for row, counts in enumerate(per_row):
            count = sum(counts)
            pixels[row, :count] = torch.randn(count, 3, TILE, TILE, generator=generator)
            mask[row, :count] = 1
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    return inputs


FAMILY = Family(name="idefics3", build=build, batch=batch, image_id=IMAGE)
SMOLVLM = Family(name="smolvlm", build=partial(build, name="smolvlm"), batch=batch, image_id=IMAGE)
