"""LLaVA-OneVision: a SigLIP tower on any-resolution tiles, pooled if there are many.

Shapes: B batch rows, S prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sppruner.adapters.anyres import AnyresAdapter
from sppruner.adapters.anyres_layout import AnyresLayout, image_sizes
from sppruner.adapters.requirements import require_dense_decoder, require_features, require_tower
from sppruner.capabilities import Capabilities
from sppruner.cost import EncoderCost, TiledEncoderCost
from sppruner.errors import InputError, UnsupportedModel
from sppruner.signals import ReceivedProbe

_ANYRES = "anyres_max_"


class LlavaOnevisionAdapter(AnyresAdapter):
    """`LlavaOnevisionForConditionalGeneration`, images only.

    Features of a large image are interpolated after the projector, so encoder states do not map to
    them one by one. Prompts of several images, as given by the processor's `batch_num_images`, hold
    only the low-resolution views.
    """

    families: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    @classmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        require_tower(config, "siglip_vision_model")
        require_features(config, "full")
        require_dense_decoder(config)
        most_tiles(config)
        return Capabilities.of(config, "received", hidden=False)

    @classmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        return TiledEncoderCost.onevision(config)

    def assign_rows(self, counts: Sequence[int], input_ids_BS: Tensor) -> list[tuple[int, int]]:
        """As for every family; also raises InputError for videos."""
        if (input_ids_BS == self.model.config.video_token_id).any():
            raise InputError("the prompts hold a video: videos are not pruned, send images only")
        return super().assign_rows(counts, input_ids_BS)

    def layouts(self, inputs: Mapping[str, Tensor]) -> list[AnyresLayout]:
        config, sizes = self.model.config, image_sizes(inputs)
        per_prompt = inputs.get("batch_num_images")
        counts = [1] * len(sizes) if per_prompt is None else [int(n) for n in per_prompt]
        single = [count == 1 for count in counts for _ in range(count)]
        return [
            AnyresLayout.for_image(
                size,
                pinpoints=config.image_grid_pinpoints,
                tile=config.vision_config.image_size,
                side=self._side,
                most_tiles=most_tiles(config),
            )
            if tiled
            else AnyresLayout(side=self._side)
            for size, tiled in zip(sizes, single, strict=True)
        ]

    def _probe(self, attention: torch.nn.Module) -> ReceivedProbe:
        return ReceivedProbe(attention)

    def _patch_states(self, output: Any) -> Tensor:
        return output.hidden_states[self.model.config.vision_feature_layer]


def most_tiles(config: Any) -> int:
    """The number of tiles in a config's "anyres_max_9". Raises UnsupportedModel if there is
    none."""
    policy = config.vision_aspect_ratio
    number = policy.removeprefix(_ANYRES)
    if not policy.startswith(_ANYRES) or not number.isdecimal():
        raise UnsupportedModel(
            f"vision_aspect_ratio={policy!r}: load a checkpoint with 'anyres_max_9' or another "
            "number of tiles"
        )
    return int(number)
