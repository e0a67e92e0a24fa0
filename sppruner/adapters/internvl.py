"""InternVL (the `transformers` port): square tiles through a ViT with a CLS token, 2×2 patches
shuffled into a token, a Qwen-like decoder.

Shapes: T tiles, N tokens of a tile, D width of the language model, V width of the hidden states of
a token, B batch rows, L packed prompt tokens, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from sppruner.adapters.base import Adapter, Encoded, EncodedImage, TowerOutput
from sppruner.adapters.requirements import require_dense_decoder, require_features, require_tower
from sppruner.adapters.tiles import find_runs, layer_of_state, owners_of, tiled_images
from sppruner.adapters.towers import skipping_layers_after
from sppruner.capabilities import Capabilities
from sppruner.compact import Compacted
from sppruner.cost import EncoderCost, ImageShape, TiledEncoderCost
from sppruner.errors import InputError, UnsupportedModel
from sppruner.signals import CONTENT_SEED, ClsRowProbe, probing


class InternVLAdapter(Adapter):
    """`InternVLForConditionalGeneration`; each tile of an image is a plane. Video frames are images
    of one tile.

    A batch holds tiles without their image: an image is a run of consecutive placeholders, since
    the processor puts a start and an end token around each.
    """

    families: ClassVar[tuple[str, ...]] = ("internvl",)

    @classmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        require_tower(config, "internvl_vision")
        require_features(config, "default")
        require_dense_decoder(config)
        height, width = config.vision_config.image_size
        if height != width:
            raise UnsupportedModel(
                f"InternVL with tiles of {height}×{width} pixels: its pixel shuffle needs square "
                "tiles, load a checkpoint whose vision_config.image_size is square"
            )
        return Capabilities.of(config, "cls", merged=True)

    @classmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        return TiledEncoderCost.internvl(config)

    @property
    def _factor(self) -> int:
        return int(1 / self.model.config.downsample_ratio)

    def layout(self, tiles: int) -> ImageShape:
        """Of an image of so many tiles."""
        vision = self.model.config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        tokens = tiles * (side // self._factor) ** 2
        return ImageShape(tiles=tiles, rows=side, columns=side, tokens=tokens)

    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, ImageShape]]:
        per_tile = self.layout(1).tokens
        found = []
        for row, start, stop in find_runs(self.placeholders(inputs["input_ids"])):
            tiles, rest = divmod(stop - start, per_tile)
            if rest:
                raise InputError(
                    f"prompt {row} has {stop - start} places for visual tokens in a row, a tile "
                    f"has {per_tile}: is the prompt cut off, or not made by this model's processor?"
                )
            found.append((row, self.layout(tiles)))
        pixels = inputs.get("pixel_values")
        given, expected = 0 if pixels is None else len(pixels), sum(s.tiles for _, s in found)
        if given != expected:
            raise InputError(
                f"{given} tiles were given, the prompts have places for {expected}: is there one "
                "image placeholder per image?"
            )
        return found

    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        shapes = self.shapes(inputs)
        config = self.model.config
        pixels = inputs["pixel_values"].to(self.model.dtype)
        tower = self.model.model.vision_tower
        layers, feature_layer = tower.encoder.layer, config.vision_feature_layer
        probe = ClsRowProbe(layer_of_state(layers, feature_layer).attention)
        probed = signals - {CONTENT_SEED}
        reading = probing(tower, probe) if probed else nullcontext()
        with skipping_layers_after(layers, feature_layer), reading:
            output = self.model.model.get_image_features(pixel_values=pixels, return_dict=True)
        if feature_layer == -1:
            states = output.last_hidden_state
        else:
            states = output.hidden_states[feature_layer]
        read = TowerOutput(
            runs=[
                run.flatten(0, 1)
                for run in torch.split(output.pooler_output, [s.tiles for _, s in shapes])
            ],
            states=states[:, 1:],
            signals=[probe.signals(tile) if probed else {} for tile in range(len(states))],
            pixels=pixels,
        )
        owners = owners_of([row for row, _ in shapes])
        images = self.images(read, owners, [shape for _, shape in shapes], signals)
        return Encoded(images=images, output=output)

    def images(
        self,
        tower: TowerOutput,
        owners: Sequence[tuple[int, int]],
        layouts: Sequence[ImageShape],
        signals: frozenset[str],
    ) -> tuple[EncodedImage, ...]:
        return tiled_images(tower, owners, layouts, signals, factor=self._factor)

    def prompt(self, packed: Any, compacted: Compacted) -> dict[str, Any]:
        """The prompt as embeddings: the model reads encoder outputs as one tensor of equal tiles,
        which pruned images no longer fill. Concatenated into one, they would work with greedy
        decoding, but beam search would split the tensor by tiles and silently mix prompts."""
        return self.embedded_prompt(packed, compacted)

    def project(self, states_KV: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(states_KV)
