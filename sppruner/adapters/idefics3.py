"""Idefics3 and SmolVLM: square tiles through SigLIP, patches shuffled into tokens, one linear
layer, a Llama decoder. The prompt has text such as <row_1_col_2> between the tiles of an image.

Shapes: T tiles, N tokens of a tile, D width of the language model, V width of the hidden states of
a token, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from sppruner.adapters.base import Adapter, Encoded, EncodedImage, TowerOutput
from sppruner.adapters.requirements import require_dense_decoder
from sppruner.adapters.tiles import find_runs, owners_of, tiled_images
from sppruner.capabilities import Capabilities
from sppruner.compact import Compacted
from sppruner.cost import EncoderCost, ImageShape, TiledEncoderCost
from sppruner.errors import InputError
from sppruner.signals import (
    CONTENT_SEED,
    ReceivedProbe,
    probing,
)


class Idefics3Adapter(Adapter):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`; each tile of an
    image is a plane, and the image's run is the concatenation of its tiles' runs.

    A batch holds tiles by prompt, not by image. The processor frames each tile with a special token
    (<fake_token_around_image>), which occurs once between two tiles of an image and twice (the end
    of one and the start of the next) between two images; this is how images are distinguished.
    Features are packed image by image, where the model's list is by prompt; the model reads both
    equally.
    """

    families: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")

    _reads_equal_tiles = False

    @classmethod
    def capabilities_of(cls, config: Any) -> Capabilities:
        require_dense_decoder(config)
        return Capabilities.of(config, "received", merged=True)

    @classmethod
    def encoder_cost(cls, config: Any) -> EncoderCost:
        return TiledEncoderCost.idefics3(config)

    def language_model(self) -> Any:
        return self.model.model.text_model

    def layout(self, tiles: int) -> ImageShape:
        """Of an image of so many tiles."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        tokens = tiles * (side // self.model.config.scale_factor) ** 2
        return ImageShape(tiles=tiles, rows=side, columns=side, tokens=tokens)

    def shapes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, ImageShape]]:
        ids = inputs["input_ids"].tolist()
        spans = find_runs(self.placeholders(inputs["input_ids"]))
        per_tile = self.layout(1).tokens
        for row, start, stop in spans:
            if stop - start != per_tile:
                raise InputError(
                    f"prompt {row} has {stop - start} places for visual tokens in a row, a tile "
                    f"has {per_tile}: is the prompt cut off, or not made by this model's processor?"
                )
        found = []
        for row, row_spans in groupby(spans, key=itemgetter(0)):
            tiles = [(start, stop) for _, start, stop in row_spans]
            if tiles[-1][1] == len(ids[row]):
                raise InputError(f"prompt {row} ends inside its last image: is it cut off?")
            frame, count = ids[row][tiles[-1][1]], 1
            for (_, stop), (start, _) in pairwise(tiles):
                if ids[row][stop:start].count(frame) > 1:
                    found.append((row, self.layout(count)))
                    count = 0
                count += 1
            found.append((row, self.layout(count)))
        return found

    def encode(self, inputs: Mapping[str, Tensor], signals: frozenset[str]) -> Encoded:
        shapes = self.shapes(inputs)
        pixels = inputs["pixel_values"].to(self.model.dtype)
        # Padding tiles, up to the most tiles of a prompt, are all zeros; the model drops them.
        tiles = pixels.flatten(0, 1)[(pixels != 0).flatten(2).any(dim=2).flatten()]
        expected = sum(shape.tiles for _, shape in shapes)
        if len(tiles) != expected:
            raise InputError(
                f"{len(tiles)} tiles were given, the prompts have places for {expected}: is there "
                "one image placeholder per image?"
            )
        tower = self.model.model.vision_model
        probe = ReceivedProbe(tower.encoder.layers[-1].self_attn)
        probed = signals - {CONTENT_SEED}
        with probing(tower, probe) if probed else nullcontext():
            output = self.model.model.get_image_features(
                pixel_values=pixels,
                pixel_attention_mask=inputs.get("pixel_attention_mask"),
                return_dict=True,
            )
        self._reads_equal_tiles = isinstance(output.pooler_output, Tensor)
        features_ND = torch.cat(list(output.pooler_output)).flatten(0, -2)
        read = TowerOutput(
            runs=torch.split(features_ND, [shape.tokens for _, shape in shapes]),
            states=output.last_hidden_state,
            signals=[probe.signals(tile) if probed else {} for tile in range(len(tiles))],
            pixels=tiles,
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
        factor = self.model.config.scale_factor
        return tiled_images(tower, owners, layouts, signals, factor=factor)

    def prompt(self, packed: Any, compacted: Compacted) -> dict[str, Any]:
        """As for every family; but transformers 5.19 reads one tensor of equal tiles, which pruned
        images do not fill."""
        if self._reads_equal_tiles:
            return self.embedded_prompt(packed, compacted)
        return super().prompt(packed, compacted)

    def project(self, states_KV: Tensor) -> Tensor:
        return self.model.model.connector.modality_projection(states_KV)
