"""Cost of the encoders: vision towers and projectors, by family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sppruner.cost.model_cost import ImageShape


def layers_run(layers: int, state: int) -> int:
    """Tower layers executed for hidden state `state`: 0 is the embeddings, -1 the last layer's.
    Adapters stop the tower at that layer."""
    return state if state >= 0 else layers + 1 + state


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipTowerCost:
    """A CLIP vision tower: patches and one CLS token through the executed layers."""

    layers: int
    """Executed layers."""
    hidden: int
    """Width of the tower."""
    intermediate: int
    """Inner width of the MLP."""
    patch: int
    """Side of a patch in pixels."""
    channels: int = 3
    """Colour channels of a pixel."""

    @classmethod
    def from_config(cls, vision: Any, state: int = -1) -> ClipTowerCost:
        """From a vision config; state: the hidden state that the projector reads."""
        return cls(
            layers=layers_run(vision.num_hidden_layers, state),
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            patch=vision.patch_size,
            channels=vision.num_channels,
        )

    def forward(self, patches: int) -> int:
        """FLOPs of one tile of `patches` patches."""
        d, n = self.hidden, patches + 1
        embed = 2 * patches * self.channels * self.patch**2 * d
        return embed + self.layers * (8 * n * d * d + 4 * n * d * self.intermediate + 4 * n * n * d)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaEncoderCost:
    """LLaVA-1.5: a CLIP tower and a two-layer projector that maps every patch."""

    tower: ClipTowerCost
    """The vision tower."""
    projector_input: int
    """Width of the states that the projector reads."""
    width: int
    """Width of the language model."""

    @classmethod
    def from_config(cls, config: Any) -> LlavaEncoderCost:
        """From a LLaVA config."""
        return cls(
            tower=ClipTowerCost.from_config(config.vision_config, config.vision_feature_layer),
            projector_input=config.vision_config.hidden_size,
            width=config.text_config.hidden_size,
        )

    def vision(self, image: ImageShape) -> int:
        """FLOPs of the tower on every tile."""
        return image.tiles * self.tower.forward(image.rows * image.columns)

    def projector(self, image: ImageShape) -> int:
        """FLOPs of the projector on every patch."""
        patches = image.tiles * image.rows * image.columns
        return 2 * patches * (self.projector_input * self.width + self.width**2)
