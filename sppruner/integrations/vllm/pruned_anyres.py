"""LLaVA-NeXT and LLaVA-OneVision in vLLM: any-resolution images, whose tiles go through the tower
together and leave as one run with newline tokens inside.

Shapes: T tiles, P patches of a tile, N tokens of an image, K kept tokens, D width of the language
model, V width of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava_next, llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from sppruner.adapters import TowerOutput
from sppruner.integrations.vllm.listening import Ears, Heard
from sppruner.integrations.vllm.pruning_model import PruningModel
from sppruner.integrations.vllm.pruning_processor import PruningProcessor
from sppruner.integrations.vllm.tower_names import TOWER_NAMES
from sppruner.signals import ClsRowProbe, ReceivedProbe


class AnyresModel(PruningModel):
    """What the two families share."""

    def layouts(self, inputs: Mapping[str, Any]) -> list[Any]:
        found: list[Any] = self._adapter.layouts({"image_sizes": inputs["image_sizes"]})
        return found

    def tower_output(
        self, runs: Sequence[Tensor], heard: Heard, inputs: Mapping[str, Any], signals: bool
    ) -> TowerOutput:
        (states_TPV,) = heard.states
        counts = [layout.tiles for layout in self.layouts(inputs)]
        # A stack of images has as many tiles for each as the largest needs.
        per_image = [len(pixels) for pixels in inputs["pixel_values"]]
        real = [
            first + tile
            for first, count in zip(_starts(per_image), counts, strict=True)
            for tile in range(count)
        ]
        heard_signals = heard.signals(len(states_TPV)) if signals else [{}] * len(states_TPV)
        return TowerOutput(
            runs=runs,
            states=states_TPV[real],
            signals=[heard_signals[tile] for tile in real],
            pixels=[
                tile
                for pixels, count in zip(inputs["pixel_values"], counts, strict=True)
                for tile in pixels[:count]
            ],
        )

    def project(self, states_KV: Tensor) -> Tensor:
        projected: Tensor = self.multi_modal_projector(states_KV)
        return projected


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of consecutive groups of these sizes starts."""
    return [sum(sizes[:at]) for at in range(len(sizes))]


class _NextProcessor(  # type: ignore[misc]
    PruningProcessor, llava_next.LlavaNextMultiModalProcessor
):
    pass


class _OnevisionProcessor(  # type: ignore[misc]
    PruningProcessor, llava_onevision.LlavaOnevisionMultiModalProcessor
):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _NextProcessor,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava_next.LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(  # type: ignore[misc]
    AnyresModel, llava_next.LlavaNextForConditionalGeneration
):
    """vLLM's LLaVA-NeXT with a CLIP tower."""

    hf_to_vllm_mapper = llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def ears(self) -> Ears:
        # vLLM loads a tower no deeper than the layer that is read.
        layers = self.vision_tower.vision_model.encoder.layers
        return Ears(
            attention=layers[-1].self_attn.attn,
            probe=ClsRowProbe,
            states=self.vision_tower,
            side="output",
        )


@MULTIMODAL_REGISTRY.register_processor(
    _OnevisionProcessor,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(  # type: ignore[misc]
    AnyresModel, llava_onevision.LlavaOnevisionForConditionalGeneration
):
    """vLLM's LLaVA-OneVision, images only. Every image of a prompt is cut into tiles: transformers
    does so only for the image of a prompt that has one."""

    hf_to_vllm_mapper = (
        llava_onevision.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
    )

    def ears(self) -> Ears:
        layers = self.vision_tower.vision_model.encoder.layers
        return Ears(
            attention=layers[-1].self_attn.attn,
            probe=ReceivedProbe,
            states=self.vision_tower,
            side="output",
        )
