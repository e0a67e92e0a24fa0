"""Qwen2.5-VL: Qwen2-VL with windows of 2 × 2 tokens in all but one block of the tower."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    set_seed,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from tests.sppruner.families.base import Family, enlarge
from tests.sppruner.families.qwen2_vl import IMAGE, MERGE, PATCH, SPECIAL, TEXT, VISION, batch

WINDOW = 2  # tokens


def build(attention: str = "sdpa", *, seed: int = 0) -> Any:
    set_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config=Qwen2_5_VLVisionConfig(
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=48,
            window_size=WINDOW * MERGE * PATCH,
            fullatt_block_indexes=[1],
            **VISION,
        ),
        text_config=Qwen2_5_VLTextConfig(**TEXT),
        attn_implementation=attention,
        **SPECIAL,
    )
    return enlarge(Qwen2_5_VLForConditionalGeneration(config))


FAMILY = Family(name="qwen2_5_vl", build=build, batch=batch, image_id=IMAGE)
