"""The encoders' share: vision towers and projectors, by family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sppruner.cost.model_cost import ImageShape


def layers_run(layers: int, state: int) -> int:
    """How many of a tower's layers run for hidden state `state`: 0 is the embeddings, -1 the last.
    Adapters stop there."""
    return state if state >= 0 else layers + 1 + state


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipTowerCost:
    """A CLIP vision tower: patches and one CLS token through the layers that run."""

    layers: int
    hidden: int
    intermediate: int
    patch: int
    channels: int = 3

    @classmethod
    def from_config(cls, vision: Any, state: int = -1) -> ClipTowerCost:
        """state: the hidden state that is read."""
        return cls(
            layers=layers_run(vision.num_hidden_layers, state),
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            patch=vision.patch_size,
            channels=vision.num_channels,
        )

    def forward(self, patches: int) -> int:
        """FLOPs of one tile of `patches`."""
        d, n = self.hidden, patches + 1
        embed = 2 * patches * self.channels * self.patch**2 * d
        return embed + self.layers * (8 * n * d * d + 4 * n * d * self.intermediate + 4 * n * n * d)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaEncoderCost:
    """LLaVA-1.5: a CLIP tower and a two-layer projector that maps every patch."""

    tower: ClipTowerCost
    projector_input: int
    width: int

    @classmethod
    def from_config(cls, config: Any) -> LlavaEncoderCost:
        return cls(
            tower=ClipTowerCost.from_config(config.vision_config, config.vision_feature_layer),
            projector_input=config.vision_config.hidden_size,
            width=config.text_config.hidden_size,
        )

    def vision(self, image: ImageShape) -> int:
        return image.tiles * self.tower.forward(image.rows * image.columns)

    def projector(self, image: ImageShape) -> int:
        patches = image.tiles * image.rows * image.columns
        return 2 * patches * (self.projector_input * self.width + self.width**2)
