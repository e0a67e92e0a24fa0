"""LLaVA-1.5 checkpoints come with other towers, depths and decoders too."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlavaConfig, LlavaNextConfig

from sppruner.adapters import capabilities
from sppruner.errors import UnsupportedModel


@pytest.mark.parametrize("family", [LlavaConfig, LlavaNextConfig])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -3]}, "concatenates vision layers"),
        ({"vision_feature_layer": 0}, "vision_feature_layer=0 reads the tower's embeddings"),
        ({"vision_feature_layer": -25}, "vision_feature_layer=-25 reads the tower"),
        ({"vision_feature_select_strategy": "full"}, "load the model with 'default'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "clip_vision_model"),
        ({"text_config": {"model_type": "mixtral"}}, "mixtral decoder"),
    ],
)
def test_variants_that_cannot_be_served_say_what_to_load(
    family: Any, change: dict[str, Any], message: str
) -> None:
    assert capabilities(family()).attention == "cls"
    with pytest.raises(UnsupportedModel, match=message):
        capabilities(family(**change))
