"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images at native resolution, 2 × 2 patches merged into a
token, M-RoPE positions in time, height and width.

Shapes: P patches and N tokens of an image, M patches of a token, K kept tokens, D width of the
language model, V width of a token's hidden states, B batch rows, S prompt tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sppruner.adapters.base import (
    Adapter,
    Encoded,
    EncodedImage,
    Kept,
    TowerOutput,
    raster,
)
from sppruner.adapters.tiles import find_runs
from sppruner.adapters.towers import batched_span_attention
from sppruner.capabilities import Capabilities
from sppruner.cost import EncoderCost, ImageShape, QwenEncoderCost
from sppruner.errors import InputError, UnsupportedModel
from sppruner.signals import (
    CONTENT_SEED,
    ReceivedProbe,
    content_seed,
    probing,
)
from sppruner.types import VisualTokens


class QwenVLAdapter(Adapter):
    """The base of the three families. Each image is one plane.

    `pixel_values` holds the patches of all images one after the other, [patches, values], and
    `image_grid_thw` each image's grid. The patches of a token are consecutive, and a token's hidden
    states are those of its patches, concatenated: V is M times the tower's width. M-RoPE positions
    stay those of the unpruned prompt, because they encode a token's position in the image.
    """

    @abstractmethod
    def _saliency_attention(self) -> nn.Module:
        """The attention of the last block in which every patch of an image attends to all
        others."""

    @classmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        text = config.text_config
        if set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
            raise UnsupportedModel(
                f"{config.model_type} with sliding-window attention: its cost is not modelled; "
                "load the model with use_sliding_window=False"
            )
        return Capabilities.of(config, "received", merged=True, positions=("keep",))

    @property
    def _merge(self) -> int:
        """Patches per token."""
        return int(self.model.config.vision_config.spatial_merge_size) ** 2

    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, ImageShape]]:
        return [(row, shape) for row, _, shape in self._owners(inputs)]

    def _owners(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, int, ImageShape]]:
        """(row, index in row, shape) of each image.

        Raises InputError for videos, and for images without a token between them, which M-RoPE
        would treat as one image.
        """
        ids_BS = inputs["input_ids"]
        grids = inputs.get("image_grid_thw")
        shapes = [] if grids is None else self.layouts(grids.tolist())
        if inputs.get("pixel_values_videos") is not None or self._video(ids_BS).any():
            raise InputError("the prompts hold a video: videos are not pruned, send images only")
        owners = self.assign_rows([shape.tokens for shape in shapes], ids_BS)
        spans = find_runs(self.placeholders(ids_BS))
        for row in range(len(ids_BS)):
            lengths = [stop - start for owner, start, stop in spans if owner == row]
            given = [s.tokens for (owner, _), s in zip(owners, shapes, strict=True) if owner == row]
            if lengths != given:
                raise InputError(
                    f"prompt {row} has runs of {lengths} places for visual tokens, its images give "
                    f"{given}: put a token such as <|vision_start|> in front of every image"
                )
        return [(row, index, s) for (row, index), s in zip(owners, shapes, strict=True)]

    def layouts(self, grids: Sequence[Sequence[int]]) -> list[ImageShape]:
        """The shapes of images from their grids (frames, rows, columns) of patches. Raises
        InputError for more than one frame."""
        shapes = []
        for frames, rows, columns in grids:
            if frames != 1:
                raise InputError(f"an image of {frames} frames: videos are not pruned, send images")
            tokens = rows * columns // self._merge
            shapes.append(ImageShape(tiles=1, rows=rows, columns=columns, tokens=tokens))
        return shapes

    def _video(self, input_ids_BS: Tensor) -> Tensor:
        return input_ids_BS == self.model.config.video_token_id

    def positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """[4, B, S] positions of the unpruned prompt: the text row, then time, height and width."""
        ids_BS = inputs["input_ids"]
        grid_3BS, _ = self.model.model.get_rope_index(
            ids_BS,
            mm_token_type_ids=self.placeholders(ids_BS).int(),
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=inputs["attention_mask"],
        )
        return torch.cat([super().positions(inputs), grid_3BS])

    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        owners = self._owners(inputs)
        pixels = inputs["pixel_values"]
        tower = self.model.model.visual
        probe = ReceivedProbe(self._saliency_attention())
        probed = signals - {CONTENT_SEED}
        reading = probing(tower, probe) if probed else nullcontext()
        # In this order, since a probe wraps the current attention.
        with batched_span_attention(tower), reading:
            output = self.model.model.get_image_features(
                pixel_values=pixels, image_grid_thw=inputs["image_grid_thw"], return_dict=True
            )
        patches = [shape.rows * shape.columns for _, _, shape in owners]
        read = TowerOutput(
            runs=output.pooler_output,
            states=torch.split(output.last_hidden_state, patches),
            signals=[probe.signals(i) if probed else {} for i in range(len(owners))],
            pixels=torch.split(pixels, patches),
            deepstack=self._deepstack(output),
        )
        images = self.images(
            read, [(row, index) for row, index, _ in owners], [s for *_, s in owners], signals
        )
        return Encoded(images=images, output=output)

    def images(
        self,
        tower: TowerOutput,
        owners: Sequence[tuple[int, int]],
        layouts: Sequence[ImageShape],
        signals: frozenset[str],
    ) -> tuple[EncodedImage, ...]:
        images = []
        for i, ((row, index), shape) in enumerate(zip(owners, layouts, strict=True)):
            features_ND = tower.runs[i]
            available = {
                name: self._by_token(values, shape).mean(dim=1)
                for name, values in tower.signals[i].items()
            }
            if CONTENT_SEED in signals:
                available[CONTENT_SEED] = content_seed(tower.pixels[i])
            plane = VisualTokens(
                features_ND=features_ND,
                hidden_NV=self._by_token(tower.states[i], shape).flatten(1),
                coords_N2=raster(*self.token_grid(shape), features_ND.device),
                signals={name: available[name] for name in signals},
                row=row,
                image=index,
            )
            images.append(
                EncodedImage(
                    row=row,
                    image=index,
                    run_ND=features_ND,
                    planes=(plane,),
                    places=(torch.arange(plane.count, device=features_ND.device),),
                    shape=shape,
                    deepstack=tuple(layer[i] for layer in tower.deepstack),
                )
            )
        return tuple(images)

    def _deepstack(self, output: Any) -> Sequence[Sequence[Tensor]]:
        """The [N, D] states that the decoder adds, by DeepStack layer and image."""
        return ()

    def token_grid(self, shape: ImageShape) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        side = self.model.config.vision_config.spatial_merge_size
        return shape.rows // side, shape.columns // side

    def _by_token(self, values: Tensor, shape: ImageShape) -> Tensor:
        """[N, M, …] values of each token's patches, tokens in raster order, from the tower's values
        [P, …] of one image."""
        return values.reshape(-1, self._merge, *values.shape[1:])

    def project(self, states_KV: Tensor) -> Tensor:
        return self.model.model.visual.merger(
            states_KV.reshape(-1, states_KV.shape[1] // self._merge)
        )


class Qwen2VLAdapter(QwenVLAdapter):
    """`Qwen2VLForConditionalGeneration`, images only."""

    families: ClassVar[tuple[str, ...]] = ("qwen2_vl",)

    @classmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        return QwenEncoderCost.qwen2(config)

    def _saliency_attention(self) -> nn.Module:
        return self.model.model.visual.blocks[-1].attn


class Qwen2_5_VLAdapter(QwenVLAdapter):
    """`Qwen2_5_VLForConditionalGeneration`, images only. Most blocks of its tower attend within
    windows, and the tower orders tokens by window; its features are in raster order again."""

    families: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    @classmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        if not config.vision_config.fullatt_block_indexes:
            raise UnsupportedModel(
                "a Qwen2.5-VL tower without a full-attention block gives no saliency: "
                "load a checkpoint with fullatt_block_indexes"
            )
        return super().capabilities_of(config)

    @classmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        return QwenEncoderCost.qwen2_5(config)

    def _saliency_attention(self) -> nn.Module:
        vision = self.model.config.vision_config
        return self.model.model.visual.blocks[max(vision.fullatt_block_indexes)].attn

    def _by_token(self, values: Tensor, shape: ImageShape) -> Tensor:
        vision = self.model.config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        order_N = _window_order(*self.token_grid(shape), side, values.device)
        return super()._by_token(values, shape)[order_N.argsort()]


class Qwen3VLAdapter(QwenVLAdapter):
    """`Qwen3VLForConditionalGeneration`, images only, with DeepStack: states of earlier tower
    layers are added to the visual tokens after the first decoder layers.

    A token keeps its own DeepStack states if a method merges others into it.
    """

    families: ClassVar[tuple[str, ...]] = ("qwen3_vl",)

    @classmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        plain = super().capabilities_of(config)
        if plain.first_prunable_layer is None:
            return plain
        # Stages must come after the last addition, which needs all tokens.
        first = max(plain.first_prunable_layer, len(config.vision_config.deepstack_visual_indexes))
        return replace(plain, first_prunable_layer=first if first < plain.decoder_layers else None)

    @classmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        return QwenEncoderCost.qwen3(config)

    def _saliency_attention(self) -> nn.Module:
        return self.model.model.visual.blocks[-1].attn

    def _deepstack(self, output: Any) -> Sequence[Sequence[Tensor]]:
        return output.deepstack_features

    def pack(self, encoded: Encoded, kept: Sequence[Kept]) -> Any:
        layers = zip(*(image.deepstack for image in encoded.images), strict=True)
        return type(encoded.output)(
            pooler_output=[image.features_KD for image in kept],
            deepstack_features=[
                [states[image.index_K] for states, image in zip(layer, kept, strict=True)]
                for layer in layers
            ],
        )


def _window_order(rows: int, columns: int, side: int, device: torch.device) -> Tensor:
    """[rows · columns] raster indices, ordered by windows of side × side tokens: windows in raster
    order, and tokens of a window in raster order."""
    row_N, column_N = raster(rows, columns, device).unbind(1)
    windows_across = -(-columns // side)
    return (row_N // side * windows_across + column_N // side).argsort(stable=True)
