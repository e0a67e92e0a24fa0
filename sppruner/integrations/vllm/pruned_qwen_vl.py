"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM.

Shapes: N tokens of an image, K kept tokens, S prompt tokens, D width of the language model, V width
of a token's hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from sppruner.adapters import TowerOutput
from sppruner.cost import ImageShape
from sppruner.integrations.vllm.listening import Ears, Heard
from sppruner.integrations.vllm.positions import KeptPositions
from sppruner.integrations.vllm.pruning_model import PruningModel
from sppruner.integrations.vllm.pruning_processor import PruningProcessor
from sppruner.integrations.vllm.wire import FIELD, ImageRequest
from sppruner.signals import ReceivedProbe


class QwenVLModel(PruningModel):
    """What the three families share: a tower that packs images, and positions in time, height and
    width, which a pruned image never loses."""

    one_dimensional: ClassVar[bool] = False

    def layouts(self, inputs: Mapping[str, Any]) -> list[ImageShape]:
        grids = inputs["image_grid_thw"]
        return self._adapter.layouts(grids.tolist() if isinstance(grids, Tensor) else grids)

    def patches(self, inputs: Mapping[str, Any]) -> list[int]:
        return [layout.rows * layout.columns for layout in self.layouts(inputs)]

    def part(self, inputs: Mapping[str, Any], images: slice) -> dict[str, Any]:
        sizes = self.patches(inputs)
        first, last = sum(sizes[: images.start]), sum(sizes[: images.stop])
        return {
            name: values[first:last] if name == "pixel_values" else values[images]
            for name, values in inputs.items()
        }

    def tower_output(
        self, runs: Sequence[Tensor], heard: Heard, inputs: Mapping[str, Any], signals: bool
    ) -> TowerOutput:
        sizes = self.patches(inputs)
        states_PV = heard.states[0].flatten(0, -2)
        return TowerOutput(
            runs=runs,
            states=torch.split(states_PV, sizes),
            signals=heard.signals(len(runs)) if signals else [{}] * len(runs),
            pixels=torch.split(inputs["pixel_values"], sizes),
        )

    def project(self, states_KV: Tensor) -> Tensor:
        side = self.config.vision_config.spatial_merge_size
        width = states_KV.shape[1] // side**2
        projected: Tensor = self.visual.merger(states_KV.reshape(-1, width))
        return projected

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        requests = [
            ImageRequest.from_tensor(feature.data[FIELD].data)
            for feature in mm_features
            if feature.modality == "image"
        ]
        if all(request.spec.is_dense for request in requests):
            # vLLM's own, which also knows videos.
            stock: Any = super(KeptPositions, self)
            positions: tuple[Tensor, int] = stock.get_mrope_input_positions(
                input_tokens, mm_features
            )
            return positions
        return self._pruned_positions(input_tokens, mm_features)

    def _pruned_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """[3, S]: the kept tokens of an image at its first position, text behind it where it is in
        the unpruned prompt."""
        pieces: list[Tensor] = []
        position = done = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            request = ImageRequest.from_tensor(feature.data[FIELD].data)
            (run,) = request.runs
            text = feature.mm_position.offset + run.start - done
            pieces.append(torch.arange(position, position + text).expand(3, -1))
            position += text
            pieces.append(torch.full((3, run.kept), position))
            done += text + run.kept
            (layout,) = self._adapter.layouts([feature.data["image_grid_thw"].data.tolist()])
            position += max(self._adapter.token_grid(layout))
        tail = len(input_tokens) - done
        pieces.append(torch.arange(position, position + tail).expand(3, -1))
        return torch.cat(pieces, dim=1), position + tail - len(input_tokens)

    def offsets(self, request: ImageRequest, layout: ImageShape, index_K: Tensor) -> Tensor:
        _, columns = self._adapter.token_grid(layout)
        return torch.stack(
            [torch.zeros_like(index_K), index_K // columns, index_K % columns], dim=1
        )


class _Qwen2Processor(PruningProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):  # type: ignore[misc]
    pass


class _Qwen2_5Processor(  # type: ignore[misc]
    PruningProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor
):
    pass


class _Qwen3Processor(PruningProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen2Processor,
    info=qwen2_vl.Qwen2VLProcessingInfo,
    dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder,
)
class PrunedQwen2VL(QwenVLModel, qwen2_vl.Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Qwen2-VL, images only."""

    def ears(self) -> Ears:
        return Ears(
            attention=self.visual.blocks[-1].attn.attn,
            probe=ReceivedProbe,
            states=self.visual.merger.ln_q,
            side="input",
        )


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen2_5Processor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5_VL(  # type: ignore[misc]
    QwenVLModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration
):
    """vLLM's Qwen2.5-VL, images only."""

    def ears(self) -> Ears:
        full = max(self.config.vision_config.fullatt_block_indexes)
        return Ears(
            attention=self.visual.blocks[full].attn.attn,
            probe=ReceivedProbe,
            states=self.visual.merger.ln_q,
            side="input",
        )


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen3Processor,
    info=qwen3_vl.Qwen3VLProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3VL(QwenVLModel, qwen3_vl.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Qwen3-VL, images only. A kept token keeps its own DeepStack states, which are columns
    behind its features."""

    def ears(self) -> Ears:
        return Ears(
            attention=self.visual.blocks[-1].attn.attn,
            probe=ReceivedProbe,
            states=self.visual.merger.norm,
            side="input",
        )

    def feature_width(self, run: Tensor) -> int:
        return int(self.config.text_config.hidden_size)
