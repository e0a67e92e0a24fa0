"""Qwen3-VL: Qwen2-VL with DeepStack after the first two of four decoder layers."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextConfig,
    set_seed,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from tests.sppruner.families.base import Family, enlarge
from tests.sppruner.families.qwen2_vl import IMAGE, SPECIAL, TEXT, VISION, batch


def build(attention: str = "sdpa", *, seed: int = 0) -> Any:
    set_seed(seed)
    config = Qwen3VLConfig(
        vision_config=Qwen3VLVisionConfig(
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=48,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
            **VISION,
        ),
        text_config=Qwen3VLTextConfig(**{"head_dim": 8} | TEXT),
        attn_implementation=attention,
        **SPECIAL,
    )
    return enlarge(Qwen3VLForConditionalGeneration(config))


FAMILY = Family(name="qwen3_vl", build=build, batch=batch, image_id=IMAGE)
