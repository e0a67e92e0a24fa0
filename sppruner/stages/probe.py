"""The attention row that stages choose by: read in a layer that runs, or asked of one that has not
run yet."""

from __future__ import annotations

import sys
from typing import Any

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


def can_compute_last_query_row(layer: Any) -> bool:
    """Whether `compute_last_query_row` can ask a layer: a Llama's, Mistral's or Qwen's, with projections of
    queries and keys apart and, where they are normed, norms of each head."""
    attention = layer.self_attn
    parts = ("q_proj", "k_proj", "head_dim", "scaling")
    if not all(hasattr(attention, part) for part in parts) or not hasattr(layer, "input_layernorm"):
        return False
    norms = [getattr(attention, norm, None) for norm in ("q_norm", "k_norm")]
    if any(norm is not None and norm.weight.shape != (attention.head_dim,) for norm in norms):
        return False
    return hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")


def compute_last_query_row(
    layer: Any, hidden_BLD: Tensor, rotary: tuple[Tensor, Tensor], attention_mask_BL: Tensor
) -> Tensor:
    """The head-mean attention [B, L], 0 at padding, that the last token would pay in `layer` to the
    states `hidden_BLD` in front of it.

    That is what PyramidDrop ranks by (arXiv 2410.17247, and its released code): the layer's input
    norm and its projections of one query and of all keys, norms and biases included where it has
    them, turned by `rotary`, cosines and sines of the tokens' positions. Equal to the last row of
    the eager map that the layer would give without a drop. O(L · width²) for the keys.
    """
    attention = layer.self_attn
    states_BLD = layer.input_layernorm(hidden_BLD)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]

    def turned(projection: str, norm: str, states_BSD: Tensor) -> Tensor:
        rows, length, _ = states_BSD.shape
        heads = getattr(attention, projection)(states_BSD).view(
            rows, length, -1, attention.head_dim
        )
        if getattr(attention, norm, None) is not None:
            heads = getattr(attention, norm)(heads)
        heads_BHSW = heads.transpose(1, 2)
        cosine, sine = (part[:, -length:] for part in rotary)
        turned_BHSW: Tensor = rotate(heads_BHSW, heads_BHSW, cosine, sine)[0]
        return turned_BHSW

    probe = LastQueryProbe(attention)
    query_BH1W = turned("q_proj", "q_norm", states_BLD[:, -1:])
    probe.read(query_BH1W, turned("k_proj", "k_norm", states_BLD), None, attention.scaling)
    return probe.take(attention_mask_BL)
