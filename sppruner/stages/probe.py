"""The last token's attention row that stages rank by: read from a layer that runs, or computed for
a layer that has not run yet.

Shapes: B batch rows, L tokens of the packed prompt, S tokens of a projection, D hidden width (in
`LastQueryProbe`, as in `Probe.read`, the width of a head), H query heads, K key heads, G query
heads of a key head, W width of a head.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


class LastQueryProbe:
    """The attention of the last token to all tokens in one decoder layer.

    One query against the layer's keys, O(L · width), with any attention implementation; equal to
    the last row of the eager map. Prompts are padded on the left, so the last token is never
    padding, and it attends to every token: only padding is masked.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._scores_BHL: Tensor | None = None

    def read(
        self, query_IHND: Tensor, key_IHND: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        last_BHD = query_IHND[:, :, -1].float()
        rows, kv_heads = key_IHND.shape[:2]
        # Grouped-query attention: each key head serves consecutive query heads.
        grouped_BKGD = last_BHD.view(rows, kv_heads, -1, last_BHD.shape[-1])
        scores_BKGL = grouped_BKGD @ key_IHND.float().transpose(2, 3)
        self._scores_BHL = scores_BKGL.flatten(1, 2) * scaling

    def take(self, attention_mask_BL: Tensor) -> Tensor:
        """The head-mean row [B, L] of the last read, 0 at padding; clears it."""
        assert self._scores_BHL is not None, "no forward ran inside `probing`"
        # The keys of a static cache include its unused positions.
        scores_BHL = self._scores_BHL[:, :, : attention_mask_BL.shape[1]]
        self._scores_BHL = None
        padding_B1L = (attention_mask_BL == 0)[:, None]
        scores_BHL = scores_BHL.masked_fill(padding_B1L, float("-inf"))
        return torch.softmax(scores_BHL, dim=-1).mean(dim=1)


def can_compute_last_query_row(layer: Any) -> bool:
    """Whether `compute_last_query_row` supports a layer: one like Llama's, Mistral's or Qwen's,
    with separate query and key projections and, if these are normed, norms per head."""
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
    """The head-mean attention [B, L], 0 at padding, of the last token in `layer` to the states
    `hidden_BLD` that enter it.

    PyramidDrop ranks by this row (arXiv 2410.17247, and its released code): the layer's input norm,
    its projections of one query and of all keys, with norms and biases if it has any, and rotary
    embeddings. rotary: cosines and sines of the tokens' positions. Equal to the last row of the
    eager map of the layer if it dropped nothing. O(L · width²) for the keys.
    """
    attention = layer.self_attn
    states_BLD = layer.input_layernorm(hidden_BLD)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]

    def project(projection: str, norm: str, states_BSD: Tensor) -> Tensor:
        rows, length, _ = states_BSD.shape
        heads = getattr(attention, projection)(states_BSD).view(
            rows, length, -1, attention.head_dim
        )
        if getattr(attention, norm, None) is not None:
            heads = getattr(attention, norm)(heads)
        heads_BHSW = heads.transpose(1, 2)
        cosine, sine = (values[:, -length:] for values in rotary)
        rotated_BHSW: Tensor = rotate(heads_BHSW, heads_BHSW, cosine, sine)[0]
        return rotated_BHSW

    probe = LastQueryProbe(attention)
    query_BH1W = project("q_proj", "q_norm", states_BLD[:, -1:])
    probe.read(query_BH1W, project("k_proj", "k_norm", states_BLD), None, attention.scaling)
    return probe.take(attention_mask_BL)
