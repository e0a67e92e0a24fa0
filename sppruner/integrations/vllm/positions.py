"""Kept tokens at their positions in the unpruned prompt, inside vLLM's own runner.

The runner asks a model with M-RoPE for the positions of a prompt before any image is encoded, and
decodes on a constant distance from them. Text behind an image depends on the image's size alone, so
both are known in time; which tokens an image keeps is not. So a kept token's position is the first
of its image, and its offset from there leaves the tower as extra columns of its embedding. The
runner embeds each step's tokens before the decoder reads them: there the columns are taken off and
the offsets written to a buffer, which `forward` adds to the step's positions.

Models with 1-D positions are served as M-RoPE models whose three rows are equal.

Shapes: S prompt tokens, L tokens of a step, M visual tokens among them, K kept tokens of an image,
D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import SupportsMultiModal

from sppruner.integrations.vllm.settings import PluginSettings
from sppruner.integrations.vllm.wire import FIELD, ImageRequest

# bfloat16 holds whole numbers up to 256: an offset is two digits of this base.
_BASE: Final = 128
_COLUMNS: Final = 6


def offset_columns(offsets_K3: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, 6] columns that carry the offsets of kept tokens in time, height and width."""
    return torch.cat([offsets_K3 // _BASE, offsets_K3 % _BASE], dim=1).to(dtype)


def read_columns(columns_M6: Tensor) -> Tensor:
    """[M, 3] offsets, the inverse of `offset_columns`."""
    high_M3, low_M3 = torch.split(columns_M6.to(torch.int64), 3, dim=1)
    return high_M3 * _BASE + low_M3


class KeptPositions(SupportsMultiModal):  # type: ignore[misc]
    """In front of a model class of vLLM."""

    supports_mrope: ClassVar[Literal[True]] = True

    settings: PluginSettings

    one_dimensional: ClassVar[bool] = True
    """Whether the decoder's positions are 1-D."""

    def hold_offsets(self, most_tokens: int) -> None:
        """Makes the buffer, for steps of at most so many tokens."""
        offsets_3L = torch.zeros(3, most_tokens, dtype=torch.int64)
        self.register_buffer("kept_offsets", offsets_3L, persistent=False)

    def carry(self, features_KD: Tensor, offsets_K3: Tensor | None) -> Tensor:
        """Features with their offsets, None for none, as they leave the tower."""
        if not self.settings.keeps:
            return features_KD
        if offsets_K3 is None:
            offsets_K3 = torch.zeros(features_KD.shape[0], 3, dtype=torch.int64)
        columns_K6 = offset_columns(offsets_K3.to(features_KD.device), features_KD.dtype)
        return torch.cat([features_KD, columns_K6], dim=1)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """As vLLM's, for embeddings that carry offsets."""
        if self.settings.keeps:
            offsets_3L = self.kept_offsets[:, : input_ids.shape[0]].zero_()
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                assert is_multimodal is not None
                columns_M6 = torch.cat([each[:, -_COLUMNS:] for each in multimodal_embeddings])
                mask_L = is_multimodal.to(offsets_3L.device, non_blocking=True)
                offsets_3L.masked_scatter_(
                    mask_L.expand(3, -1), read_columns(columns_M6).T.contiguous()
                )
                multimodal_embeddings = [each[:, :-_COLUMNS] for each in multimodal_embeddings]
        embedded: Tensor = super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """As vLLM's, at the positions of this step with its offsets."""
        if self.settings.keeps:
            positions = positions + self.kept_offsets[:, : positions.shape[-1]]
            if self.one_dimensional:
                positions = positions[0]
        return super().forward(input_ids, positions, *args, **kwargs)

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """[3, S] positions of a prompt, with each kept token at the first of its run, and the
        distance of decoded tokens from their index."""
        positions_S: list[int] = []
        position = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            if FIELD not in feature.data:  # a video, which counts as text
                continue
            request = ImageRequest.from_tensor(feature.data[FIELD].data)
            for run in request.runs:
                text = feature.mm_position.offset + run.start - len(positions_S)
                positions_S += range(position, position + text)
                position += text
                if request.keeps_positions:
                    positions_S += [position] * run.kept
                    position += run.tokens
                else:
                    positions_S += range(position, position + run.kept)
                    position += run.kept
        tail = len(input_tokens) - len(positions_S)
        positions_S += range(position, position + tail)
        delta = position + tail - len(input_tokens)
        return torch.tensor(positions_S).expand(3, -1).contiguous(), delta

    def offsets(self, request: ImageRequest, layout: Any, index_K: Tensor) -> Tensor:
        """[K, 3] offsets of an image's kept tokens from the first of their run."""
        starts = [0]
        for run in request.runs[:-1]:
            starts.append(starts[-1] + run.tokens)
        starts_R = torch.tensor(starts, device=index_K.device)
        run_K = torch.searchsorted(starts_R, index_K, right=True) - 1
        return (index_K - starts_R[run_K])[:, None].expand(-1, 3)
