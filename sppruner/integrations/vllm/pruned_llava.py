"""LLaVA-1.5 in vLLM.

Shapes: I images, N tokens of an image, D width of the language model, V width of the vision
encoder, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from sppruner.adapters import TowerOutput
from sppruner.integrations.vllm.listening import Ears, Heard
from sppruner.integrations.vllm.pruning_model import PruningModel
from sppruner.integrations.vllm.pruning_processor import PruningProcessor
from sppruner.integrations.vllm.tower_names import TOWER_NAMES
from sppruner.signals import ClsRowProbe


class _Processor(PruningProcessor, stock.LlavaMultiModalProcessor):  # type: ignore[misc]
    pass


class _PixtralProcessor(PruningProcessor, stock.PixtralHFMultiModalProcessor):  # type: ignore[misc]
    """Of the same architecture, and always dense: the family's adapter refuses its tower."""


def _processor(info: Any, dummy_inputs: Any) -> Any:
    pixtral = isinstance(info, stock.PixtralHFProcessingInfo)
    return (_PixtralProcessor if pixtral else _Processor)(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _processor,
    info=stock._build_llava_or_pixtral_hf_info,
    dummy_inputs=stock.LlavaDummyInputsBuilder,
)
class PrunedLlava(PruningModel, stock.LlavaForConditionalGeneration):  # type: ignore[misc]
    """vLLM's LLaVA with a CLIP tower."""

    hf_to_vllm_mapper = stock.LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def ears(self) -> Ears:
        # vLLM loads a tower no deeper than the layer that is read.
        layers = self.vision_tower.vision_model.encoder.layers
        return Ears(
            attention=layers[-1].self_attn.attn,
            probe=ClsRowProbe,
            states=self.multi_modal_projector,
            side="input",
        )

    def layouts(self, inputs: Mapping[str, Any]) -> list[Any]:
        return [self._adapter.layout] * len(inputs["pixel_values"])

    def tower_output(
        self, runs: Sequence[Tensor], heard: Heard, inputs: Mapping[str, Any], signals: bool
    ) -> TowerOutput:
        (states_INV,) = heard.states
        return TowerOutput(
            runs=runs,
            states=states_INV,
            signals=heard.signals(len(runs)) if signals else [{}] * len(runs),
            pixels=inputs["pixel_values"],
        )

    def project(self, states_KV: Tensor) -> Tensor:
        projected: Tensor = self.multi_modal_projector(states_KV)
        return projected
