"""InternVL, Idefics3 and SmolVLM in vLLM: images cut into square tiles, each a plane.

Shapes: T tiles, P patches of a tile, N tokens of an image, K kept tokens, D width of the language
model, V width of the hidden states of a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models import idefics3, interns1, smolvlm
from vllm.multimodal import MULTIMODAL_REGISTRY

from sppruner.adapters import TowerOutput
from sppruner.cost import ImageShape
from sppruner.integrations.vllm.listening import Ears, Heard
from sppruner.integrations.vllm.pruning_model import PruningModel
from sppruner.integrations.vllm.pruning_processor import PruningProcessor
from sppruner.signals import ClsRowProbe, ReceivedProbe


class TiledModel(PruningModel):
    """What the families share: the tiles of all images in one tensor, and how many each has."""

    @abstractmethod
    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        """Tiles of each image."""

    @abstractmethod
    def patch_states(self, states: Tensor) -> Tensor:
        """[T, P, V] of what the tower returned."""

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageShape]:
        return [self._adapter.layout(tiles) for tiles in self.tiles(inputs)]

    def part(self, inputs: Mapping[str, Any], images: slice) -> dict[str, Any]:
        sizes = self.tiles(inputs)
        first, last = sum(sizes[: images.start]), sum(sizes[: images.stop])
        return {
            name: values[first:last] if name.startswith("pixel_") else values[images]
            for name, values in inputs.items()
        }

    def tower_output(
        self, runs: Sequence[Tensor], heard: Heard, inputs: Mapping[str, Any], signals: bool
    ) -> TowerOutput:
        states_TPV = self.patch_states(heard.states[0])
        tiles = len(states_TPV)
        return TowerOutput(
            runs=runs,
            states=states_TPV,
            signals=heard.signals(tiles) if signals else [{}] * tiles,
            pixels=inputs["pixel_values"],
        )


class _InternVLProcessor(PruningProcessor, interns1.InternS1MultiModalProcessor):  # type: ignore[misc]
    pass


class _Idefics3Processor(PruningProcessor, idefics3.Idefics3MultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _InternVLProcessor,
    info=interns1.InternS1ProcessingInfo,
    dummy_inputs=interns1.InternS1DummyInputsBuilder,
)
class PrunedInternVL(TiledModel, interns1.InternS1ForConditionalGeneration):  # type: ignore[misc]
    """vLLM's class for the InternVL of transformers."""

    def ears(self) -> Ears:
        return Ears(
            attention=self.vision_tower.encoder.layer[-1].attention.attn,
            probe=ClsRowProbe,
            states=self.vision_tower,
            side="output",
        )

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        return [int(tiles) for tiles in inputs["image_num_patches"]]

    def part(self, inputs: Mapping[str, Any], images: slice) -> dict[str, Any]:
        # The id of the placeholder is said once for all images.
        own = {name: values for name, values in inputs.items() if name != "image_token_id"}
        others = {name: values for name, values in inputs.items() if name == "image_token_id"}
        return super().part(own, images) | others

    def patch_states(self, states: Tensor) -> Tensor:
        return states[:, 1:]

    def project(self, states_KV: Tensor) -> Tensor:
        projected: Tensor = self.multi_modal_projector(states_KV)
        return projected


class Idefics3Model(TiledModel):
    """What Idefics3 and SmolVLM share."""

    def ears(self) -> Ears:
        return Ears(
            attention=self.model.vision_model.encoder.layers[-1].self_attn.attn,
            probe=ReceivedProbe,
            states=self.model.vision_model,
            side="output",
        )

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        return [int(tiles) for tiles in inputs["num_patches"]]

    def patch_states(self, states: Tensor) -> Tensor:
        return states

    def project(self, states_KV: Tensor) -> Tensor:
        projected: Tensor = self.model.connector.modality_projection(states_KV)
        return projected


@MULTIMODAL_REGISTRY.register_processor(
    _Idefics3Processor,
    info=idefics3.Idefics3ProcessingInfo,
    dummy_inputs=idefics3.Idefics3DummyInputsBuilder,
)
class PrunedIdefics3(Idefics3Model, idefics3.Idefics3ForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Idefics3."""


@MULTIMODAL_REGISTRY.register_processor(
    _Idefics3Processor,
    info=smolvlm.SmolVLMProcessingInfo,
    dummy_inputs=idefics3.Idefics3DummyInputsBuilder,
)
class PrunedSmolVLM(Idefics3Model, smolvlm.SmolVLMForConditionalGeneration):  # type: ignore[misc]
    """vLLM's SmolVLM."""
