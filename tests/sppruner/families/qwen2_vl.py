"""Qwen2-VL: grids of 2 × 3 to 5 × 4 tokens, each of 2 × 2 patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLTextConfig,
    set_seed,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from tests.sppruner.families import base
from tests.sppruner.families.base import (
    Family,
    enlarge,
    left_padded,
    prompts,
)

IMAGE, VIDEO, START, END = 4, 5, 6, 7
PATCH, FRAMES, MERGE = 4, 2, 2
GRIDS = [(6, 8), (4, 6), (6, 10), (10, 8)]
"""(rows, columns) of patches of the images, used in turn; the third is wider than four windows of
2 × 2."""

SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TEXT = {
    **base.TEXT,
    "num_hidden_layers": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    },
}
VISION = {
    "depth": 3,
    "num_heads": 4,
    "patch_size": PATCH,
    "temporal_patch_size": FRAMES,
    "spatial_merge_size": MERGE,
}


def build(attention: str = "sdpa", *, seed: int = 0) -> Any:
    set_seed(seed)
    config = Qwen2VLConfig(
        vision_config=Qwen2VLVisionConfig(embed_dim=32, hidden_size=32, mlp_ratio=2, **VISION),
        text_config=Qwen2VLTextConfig(**TEXT),
        attn_implementation=attention,
        **SPECIAL,
    )
    return enlarge(Qwen2VLForConditionalGeneration(config))


def batch(images_per_row: Sequence[int], *, seed: int = 1) -> dict[str, Tensor]:
    total = sum(images_per_row)
    grids = [GRIDS[i % len(GRIDS)] for i in range(total)]
    runs = iter([[START, *[IMAGE] * (rows * columns // MERGE**2), END] for rows, columns in grids])
    ids = prompts([[next(runs) for _ in range(count)] for count in images_per_row], seed=seed)
    inputs = left_padded(ids)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if total:
        patches = sum(rows * columns for rows, columns in grids)
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(patches, 3 * FRAMES * PATCH**2, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, *grid] for grid in grids])
    return inputs


FAMILY = Family(name="qwen2_vl", build=build, batch=batch, image_id=IMAGE)
