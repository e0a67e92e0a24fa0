"""The attention row that stages choose by."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LastQueryProbe:
    """The attention of the last token to all others in one decoder layer.

    One query against the layer's keys, O(L · width), whatever attention runs; equal to the last
    row of the eager map. Prompts are padded on the left, so the last token is always a real one,
    and it sees every token: only padding has to be masked.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._scores_BHL: Tensor | None = None

    def read(
        self, query_IHND: Tensor, key_IHND: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        last_BHD = query_IHND[:, :, -1].float()
        rows, kv_heads = key_IHND.shape[:2]
        # Grouped-query attention: each key head serves several query heads in a row.
        grouped_BKGD = last_BHD.view(rows, kv_heads, -1, last_BHD.shape[-1])
        scores_BKGL = grouped_BKGD @ key_IHND.float().transpose(2, 3)
        self._scores_BHL = scores_BKGL.flatten(1, 2) * scaling

    def take(self, attention_mask_BL: Tensor) -> Tensor:
        """The head-mean row [B, L] of what was read last, 0 at padding; it is then forgotten."""
        assert self._scores_BHL is not None, "no forward ran inside `probing`"
        # A static cache hands its unused places on as keys.
        scores_BHL = self._scores_BHL[:, :, : attention_mask_BL.shape[1]]
        self._scores_BHL = None
        hidden_B1L = (attention_mask_BL == 0)[:, None]
        return torch.softmax(scores_BHL.masked_fill(hidden_B1L, float("-inf")), dim=-1).mean(dim=1)
