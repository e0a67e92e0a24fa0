"""Weight names of a CLIP or SigLIP tower, as transformers from version 5 saves them: without
the `vision_model.` in their middle that vLLM looks for."""

from __future__ import annotations

from typing import Final

from vllm.model_executor.models.utils import WeightsMapper

_PARTS: Final = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")

# vLLM applies prefixes in order, each to what the one before made.
TOWER_NAMES: Final = WeightsMapper(
    orig_to_new_prefix={
        f"vision_tower.{part}.": f"vision_tower.vision_model.{part}." for part in _PARTS
    }
)
"""To be added to a model's own mapper."""
