"""Cost of the encoders that cut images into tiles and merge patches before the projector."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from sppruner.cost.encoders import ClipTowerCost, layers_run
from sppruner.cost.model_cost import ImageShape


class TowerCost(Protocol):
    """FLOPs of a vision tower."""

    def forward(self, patches: int) -> int:
        """FLOPs of one tile of `patches` patches."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipTowerCost:
    """A SigLIP vision tower: patches without a CLS token."""

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
    pooled: bool = False
    """Whether the attention-pooling head also runs; its output is unused."""

    @classmethod
    def from_config(cls, vision: Any, state: int = -1) -> SiglipTowerCost:
        """From a vision config; state: the hidden state that the projector reads."""
        return cls(
            layers=layers_run(vision.num_hidden_layers, state),
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            patch=vision.patch_size,
            channels=vision.num_channels,
            pooled=getattr(vision, "vision_use_head", False),
        )

    def forward(self, patches: int) -> int:
        """FLOPs of one tile of `patches` patches."""
        d, n, wide = self.hidden, patches, self.intermediate
        embed = 2 * n * self.channels * self.patch**2 * d
        total = embed + self.layers * (8 * n * d * d + 4 * n * d * wide + 4 * n * n * d)
        if self.pooled:
            # One query over all patches, then an MLP on the one resulting token.
            total += 4 * (n + 1) * d * d + 4 * n * d + 4 * d * wide
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledEncoderCost:
    """A tower on every tile, then a projector of linear layers on every merged token. Pixel shuffle
    and pooling of features are not counted."""

    tower: TowerCost
    """The vision tower."""
    merge: int
    """Patches merged into one token."""
    widths: tuple[int, ...]
    """Widths of the projector's layers, its input first."""

    @classmethod
    def onevision(cls, config: Any) -> TiledEncoderCost:
        """From a LLaVA-OneVision config: SigLIP, a two-layer projector on every patch."""
        vision, width = config.vision_config, config.text_config.hidden_size
        return cls(
            tower=SiglipTowerCost.from_config(vision, config.vision_feature_layer),
            merge=1,
            widths=(vision.hidden_size, width, width),
        )

    @classmethod
    def internvl(cls, config: Any) -> TiledEncoderCost:
        """From an InternVL config: a ViT with a CLS token, pixel shuffle, a two-layer projector."""
        vision, width = config.vision_config, config.text_config.hidden_size
        merge = int(1 / config.downsample_ratio) ** 2
        tower = ClipTowerCost(
            layers=layers_run(vision.num_hidden_layers, config.vision_feature_layer),
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            patch=vision.patch_size[0],
            channels=vision.num_channels,
        )
        return cls(tower=tower, merge=merge, widths=(merge * vision.hidden_size, width, width))

    @classmethod
    def idefics3(cls, config: Any) -> TiledEncoderCost:
        """From an Idefics3 or SmolVLM config: SigLIP, pixel shuffle, one linear layer."""
        vision, merge = config.vision_config, config.scale_factor**2
        return cls(
            tower=SiglipTowerCost.from_config(vision),
            merge=merge,
            widths=(merge * vision.hidden_size, config.text_config.hidden_size),
        )

    def vision(self, image: ImageShape) -> int:
        """FLOPs of the tower on every tile."""
        return image.tiles * self.tower.forward(image.rows * image.columns)

    def projector(self, image: ImageShape) -> int:
        """FLOPs of the projector on every merged token."""
        tokens = image.tiles * image.rows * image.columns // self.merge
        return 2 * tokens * sum(a * b for a, b in pairwise(self.widths))
