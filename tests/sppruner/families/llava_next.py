"""LLaVA-NeXT: a low-resolution view of 16 tokens and up to four high-resolution tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    set_seed,
)

from tests.sppruner.families.anyres import tiled_batch
from tests.sppruner.families.base import (
    TEXT,
    VISION,
    Family,
    enlarge,
)

IMAGE = 5
SIDE, TILE = 4, 16
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
SIZES = {
    (40, 25): (5, 72),
    (16, 64): (4, 68),
    (7, 5): (3, 28),
    (20, 33): (5, 52),
    (30, 30): (5, 88),
}
"""(height, width) of the images, used in turn → (tiles, visual tokens), as the processor counts."""


def build(attention: str = "sdpa", *, seed: int = 0, feature_layer: int = -2) -> Any:
    set_seed(seed)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            **VISION,
            image_size=TILE,
            patch_size=TILE // SIDE,
            projection_dim=32,
        ),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=feature_layer,
        attn_implementation=attention,
    )
    return enlarge(LlavaNextForConditionalGeneration(config))


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    return tiled_batch(images_per_row, sizes=SIZES, image_id=IMAGE, tile=TILE, seed=seed)


FAMILY = Family(name="llava_next", build=build, batch=batch, image_id=IMAGE)
