"""Cost of one row, pruned and dense: an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sppruner.cost.decoder_cost import DecoderCost
from sppruner.errors import SpecError

PARTS = ("vision", "projector", "pruner", "prefill", "decode")
"""The parts of a row's FLOPs, in the order in which they run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageShape:
    """One image as the encoder processes it."""

    tiles: int
    """Tiles of the image; 1 for families without tiling."""
    rows: int
    """Patches of a tile from top to bottom."""
    columns: int
    """Patches of a tile from left to right."""
    tokens: int
    """Visual tokens of the image in the prompt."""


class EncoderCost(Protocol):
    """FLOPs of one image, up to the features the decoder reads."""

    def vision(self, image: ImageShape) -> int:
        """FLOPs of the vision tower."""
        ...

    def projector(self, image: ImageShape) -> int:
        """FLOPs from the tower's states to the features."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """Modelled cost of one row as it ran, and of the same row dense."""

    flops: Mapping[str, int]
    """FLOPs by part of `PARTS`."""
    flops_dense: Mapping[str, int]
    """The same without pruning."""
    kv_bytes: int
    """KV cache in bytes after the last generated token."""
    kv_bytes_dense: int
    """The same without pruning."""
    flops_cached: Mapping[str, int] = field(default_factory=dict)
    """FLOPs of `flops` that this row did not cost, since a cache held their result."""

    def __post_init__(self) -> None:
        for flops in (self.flops, self.flops_dense, self.flops_cached):
            unknown = flops.keys() - set(PARTS)
            if unknown:
                raise SpecError(f"FLOPs of {sorted(unknown)}: the parts are {', '.join(PARTS)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON-compatible values."""
        return {
            "flops": dict(self.flops),
            "flops_dense": dict(self.flops_dense),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_dense": self.kv_bytes_dense,
            "flops_cached": dict(self.flops_cached),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RowCost:
        """The inverse of `to_dict`."""
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A vision-language model: an encoder whose features enter a decoder."""

    encoder: EncoderCost
    """Vision tower and projector."""
    decoder: DecoderCost
    """The language model."""

    def row(
        self,
        *,
        images: Sequence[ImageShape],
        layer_tokens: Sequence[int],
        prompt_tokens_dense: int,
        new_tokens: int,
        pruner_flops: int,
        images_cached: bool = False,
        suffix_tokens: int | None = None,
    ) -> RowCost:
        """The cost of one row.

        layer_tokens: prompt tokens at each decoder layer. prompt_tokens_dense: prompt tokens
        without pruning. pruner_flops: `PruneReport.selection_flops`, the work of selecting that is
        not in `DecoderCost.stages`. images_cached: whether the images' features were in a cache.
        suffix_tokens: prompt tokens behind a prefix whose keys and values were in a cache; None
        where the whole prompt was read.

        Selection follows the projector, so vision and projector cost the same pruned and dense. The
        pruner's own work counts for the pruned row only: `pruner_flops`, and the attention rows
        that its stages rank by inside the decoder.
        """
        shared = {
            "vision": sum(self.encoder.vision(image) for image in images),
            "projector": sum(self.encoder.projector(image) for image in images),
        }
        dense_tokens = [prompt_tokens_dense] * self.decoder.layers

        def parts(pruner: int, tokens: Sequence[int]) -> dict[str, int]:
            return shared | {
                "pruner": pruner,
                "prefill": self.decoder.prefill(tokens),
                "decode": self.decoder.decode(tokens, new_tokens),
            }

        flops = parts(pruner_flops + self.decoder.stages(layer_tokens), layer_tokens)
        cached: dict[str, int] = {}
        if suffix_tokens is not None:
            read = sum(self.decoder.layer(suffix_tokens, tokens) for tokens in layer_tokens)
            cached = {name: flops[name] for name in ("vision", "projector", "pruner")}
            cached["prefill"] = flops["prefill"] - self.decoder.head - read
        elif images_cached:
            cached = dict(shared)
        return RowCost(
            flops=flops,
            flops_cached=cached,
            flops_dense=parts(0, dense_tokens),
            kv_bytes=self.decoder.kv_bytes(layer_tokens, new_tokens),
            kv_bytes_dense=self.decoder.kv_bytes(dense_tokens, new_tokens),
        )
