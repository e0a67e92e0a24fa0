"""What one row costs: an encoder, a decoder, and the row beside the same row dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sppruner.cost.decoder import DecoderCost

PARTS = ("vision", "projector", "pruner", "prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageShape:
    """What the encoder sees of one image: `tiles` grids of rows × columns patches each (one for
    families that do not cut images up), and the visual tokens the prompt then holds for it."""

    tiles: int
    rows: int
    columns: int
    tokens: int


class EncoderCost(Protocol):
    """FLOPs of one image, up to the features the decoder reads."""

    def vision(self, image: ImageShape) -> int:
        """The vision tower."""
        ...

    def projector(self, image: ImageShape) -> int:
        """From the tower's states to features."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """One row as it ran beside the same row dense. FLOPs by part of `PARTS`; KV cache in bytes
    after the last generated token."""

    flops: Mapping[str, int]
    flops_dense: Mapping[str, int]
    kv_bytes: int
    kv_bytes_dense: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "flops": dict(self.flops),
            "flops_dense": dict(self.flops_dense),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_dense": self.kv_bytes_dense,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RowCost:
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A vision-language model: an encoder whose features enter a decoder."""

    encoder: EncoderCost
    decoder: DecoderCost

    def row(
        self,
        *,
        images: Sequence[ImageShape],
        layer_tokens: Sequence[int],
        prompt_tokens_dense: int,
        new_tokens: int,
        pruner_flops: int,
    ) -> RowCost:
        """The cost of one row whose prompt holds `layer_tokens` at each decoder layer.

        Selection follows the projector, so vision and projector cost the same in both columns; the
        pruner's own work stands in the pruned one only: `pruner_flops` (`PruneReport`'s
        `selection_flops`), and the rows that its stages go by inside the decoder.
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

        return RowCost(
            flops=parts(pruner_flops + self.decoder.stages(layer_tokens), layer_tokens),
            flops_dense=parts(0, dense_tokens),
            kv_bytes=self.decoder.kv_bytes(layer_tokens, new_tokens),
            kv_bytes_dense=self.decoder.kv_bytes(dense_tokens, new_tokens),
        )
