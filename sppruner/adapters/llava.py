"""LLaVA-1.5: a CLIP tower with a CLS token, a two-layer projector, a Llama-like decoder."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from sppruner.adapters.base import Adapter, Encoded
from sppruner.compact import full_positions
from sppruner.cost import LlavaCost
from sppruner.errors import UnsupportedModel
from sppruner.signals import CLS_ATTENTION, CONTENT_SEED, ClsRowProbe, probing
from sppruner.types import VisualTokens


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration` with a CLIP tower and one image per placeholder run."""

    family = "llava"
    signals: ClassVar[frozenset[str]] = frozenset({CLS_ATTENTION, CONTENT_SEED})

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        if config.vision_config.model_type != "clip_vision_model":
            raise UnsupportedModel(
                f"LLaVA with a {config.vision_config.model_type} tower: only CLIP towers are known"
            )
        if not isinstance(config.vision_feature_layer, int):
            raise UnsupportedModel("LLaVA that concatenates several vision layers is not supported")
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModel(
                "vision_feature_select_strategy='full' hands the CLS token on as a patch: "
                "load the model with 'default'"
            )

    def _tower(self) -> Any:
        return self.model.model.vision_tower

    def _feature_layer_attention(self) -> torch.nn.Module:
        """The attention of the layer whose output is projected: -1 is the last, -2 the one before.

        Saliency is read at the depth of the features (pruners such as VisionZip do the same).
        """
        index = self.model.config.vision_feature_layer
        layers = self._tower().encoder.layers
        return layers[index if index < 0 else index - 1].self_attn

    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        pixels = inputs["pixel_values"].to(self.model.dtype)
        tower = self._tower()
        probe = ClsRowProbe(self._feature_layer_attention())
        probed = probing(tower, probe) if CLS_ATTENTION in signals else nullcontext()
        with probed:
            output = self.model.model.get_image_features(pixel_values=pixels, return_dict=True)

        features = list(output.pooler_output)
        hidden_INV = output.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        cells = torch.arange(side, device=pixels.device)
        coords_N2 = torch.cartesian_prod(cells, cells)
        places = self.assign_rows([f.shape[0] for f in features], inputs["input_ids"])
        images = []
        for i, (row, index) in enumerate(places):
            read: dict[str, Tensor] = {}
            if CLS_ATTENTION in signals:
                assert probe.rows_IN is not None
                read[CLS_ATTENTION] = probe.rows_IN[i]
            if CONTENT_SEED in signals:
                raw = pixels[i].float().cpu().numpy().tobytes()
                read[CONTENT_SEED] = torch.tensor(zlib.crc32(raw))
            images.append(
                VisualTokens(
                    features_ND=features[i],
                    hidden_NV=hidden_INV[i],
                    coords_N2=coords_N2,
                    signals=read,
                    row=row,
                    image=index,
                )
            )
        return Encoded(images=tuple(images), output=output)

    def pack(self, encoded: Encoded, features: Sequence[Tensor]) -> Any:
        return type(encoded.output)(pooler_output=list(features))

    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return full_positions(inputs["attention_mask"])

    def cost(self) -> LlavaCost:
        size = torch.finfo(self.model.dtype).bits // 8
        return LlavaCost.from_config(self.model.config, bytes_per_value=size)
