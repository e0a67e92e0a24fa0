"""LLaVA-OneVision: a low-resolution view of 16 tokens and a grid of tiles, pooled beyond two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    set_seed,
)

from tests.sppruner.families.anyres import tiled_batch
from tests.sppruner.families.base import (
    TEXT,
    VISION,
    Family,
    enlarge,
)

IMAGE, VIDEO = 5, 6
SIDE, TILE = 4, 16
PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32], [48, 16], [16, 48], [48, 48], [32, 48]]
SIZES = {(48, 48): (10, 46), (13, 64): (4, 42), (40, 20): (10, 56), (7, 5): (2, 28)}
"""(height, width) of the images, used in turn → (tiles, visual tokens), as the processor counts:
pooled; unpadded to a strip; pooled after unpadding; one tile and the low-resolution view."""


def build(attention: str = "sdpa", *, seed: int = 0, feature_layer: int = -1) -> Any:
    set_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **VISION,
            image_size=TILE,
            patch_size=TILE // SIDE,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_layer=feature_layer,
        attn_implementation=attention,
    )
    return enlarge(LlavaOnevisionForConditionalGeneration(config))


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    return tiled_batch(images_per_row, sizes=SIZES, image_id=IMAGE, tile=TILE, seed=seed)


FAMILY = Family(name="llava_onevision", build=build, batch=batch, image_id=IMAGE)
