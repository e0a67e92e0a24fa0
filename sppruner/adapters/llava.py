"""LLaVA-1.5: a CLIP tower with a CLS token, a two-layer projector, a Llama-like decoder.

Shapes: I images, N tokens of an image, D width of the language model, V width of the vision
encoder, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from sppruner.adapters.base import Adapter, Encoded, EncodedImage, TowerOutput, raster
from sppruner.adapters.requirements import require_dense_decoder, require_features, require_tower
from sppruner.adapters.tiles import layer_of_state
from sppruner.adapters.towers import skipping_layers_after
from sppruner.capabilities import Capabilities
from sppruner.cost import EncoderCost, ImageShape, LlavaEncoderCost
from sppruner.signals import (
    ATTENTION,
    CLS_ATTENTION,
    CONTENT_SEED,
    KEYS,
    ClsRowProbe,
    content_seed,
    probing,
)
from sppruner.types import VisualTokens


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration` with a CLIP tower and one image per placeholder run."""

    families: ClassVar[tuple[str, ...]] = ("llava",)

    @classmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        require_tower(config, "clip_vision_model")
        require_features(config, "default")
        require_dense_decoder(config)
        return Capabilities.of(config, "cls")

    @classmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        return LlavaEncoderCost.from_config(config)

    @property
    def layout(self) -> ImageShape:
        """Of every image."""
        vision = self.model.config.vision_config
        side = int(vision.image_size // vision.patch_size)
        return ImageShape(tiles=1, rows=side, columns=side, tokens=side * side)

    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, ImageShape]]:
        pixels = inputs.get("pixel_values")
        counts = [] if pixels is None else [self.layout.tokens] * len(pixels)
        owners = self.assign_rows(counts, inputs["input_ids"])
        return [(row, self.layout) for row, _ in owners]

    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        pixels = inputs["pixel_values"].to(self.model.dtype)
        tower, feature_layer = self.model.model.vision_tower, self.model.config.vision_feature_layer
        layers = tower.encoder.layers
        probe = ClsRowProbe(layer_of_state(layers, feature_layer).self_attn)
        probed = signals & {ATTENTION, CLS_ATTENTION, KEYS}
        reading = probing(tower, probe) if probed else nullcontext()
        with skipping_layers_after(layers, feature_layer), reading:
            output = self.model.model.get_image_features(pixel_values=pixels, return_dict=True)

        runs = list(output.pooler_output)
        owners = self.assign_rows([run.shape[0] for run in runs], inputs["input_ids"])
        read = TowerOutput(
            runs=runs,
            states=output.hidden_states[feature_layer][:, 1:],
            signals=[probe.signals(i) if probed else {} for i in range(len(runs))],
            pixels=pixels,
        )
        images = self.images(read, owners, [self.layout] * len(runs), signals)
        return Encoded(images=images, output=output)

    def images(
        self,
        tower: TowerOutput,
        owners: Sequence[tuple[int, int]],
        layouts: Sequence[ImageShape],
        signals: frozenset[str],
    ) -> tuple[EncodedImage, ...]:
        images = []
        for i, ((row, index), layout) in enumerate(zip(owners, layouts, strict=True)):
            run_ND, available = tower.runs[i], dict(tower.signals[i])
            if CONTENT_SEED in signals:
                available[CONTENT_SEED] = content_seed(tower.pixels[i])
            plane = VisualTokens(
                features_ND=run_ND,
                hidden_NV=tower.states[i],
                coords_N2=raster(layout.rows, layout.columns, run_ND.device),
                signals={name: available[name] for name in signals},
                row=row,
                image=index,
            )
            images.append(
                EncodedImage(
                    row=row,
                    image=index,
                    run_ND=run_ND,
                    planes=(plane,),
                    places=(torch.arange(plane.count, device=run_ND.device),),
                    shape=layout,
                )
            )
        return tuple(images)

    def project(self, states_KV: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(states_KV)
