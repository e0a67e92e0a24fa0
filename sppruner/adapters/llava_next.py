"""LLaVA-NeXT (LLaVA-1.6): LLaVA's CLIP tower and projector on any-resolution tiles.

Shapes: K kept tokens, V width of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sppruner.adapters.anyres import AnyresAdapter
from sppruner.adapters.anyres_layout import AnyresLayout, image_sizes
from sppruner.adapters.requirements import require_dense_decoder, require_features, require_tower
from sppruner.capabilities import Capabilities
from sppruner.cost import EncoderCost, LlavaEncoderCost
from sppruner.signals import ClsRowProbe


class LlavaNextAdapter(AnyresAdapter):
    """`LlavaNextForConditionalGeneration` with a CLIP tower."""

    families: ClassVar[tuple[str, ...]] = ("llava_next",)

    @classmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        require_tower(config, "clip_vision_model")
        require_features(config, "default")
        require_dense_decoder(config)
        return Capabilities.of(config, "cls")

    @classmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        return LlavaEncoderCost.from_config(config)

    def layouts(self, inputs: Mapping[str, Tensor]) -> list[AnyresLayout]:
        config = self.model.config
        return [
            AnyresLayout.for_image(
                size,
                pinpoints=config.image_grid_pinpoints,
                tile=config.vision_config.image_size,
                side=self._side,
            )
            for size in image_sizes(inputs)
        ]

    def _probe(self, attention: torch.nn.Module) -> ClsRowProbe:
        return ClsRowProbe(attention)

    def _patch_states(self, output: Any) -> Tensor:
        return output.hidden_states[self.model.config.vision_feature_layer][:, 1:]

    def project(self, states_KV: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(states_KV)
