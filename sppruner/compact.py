"""The only place that re-packs sequences: from a keep mask to left-padded, gathered tensors.

Left padding is what `generate` expects; gathering with one stable argsort keeps the order of the
kept tokens and needs no loop over rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sppruner.spec import Positions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compacted:
    """A shortened batch. input_ids_BL, attention_mask_BL: int64. positions_RBL: one row (1-D RoPE)
    or four (text, t, h, w)."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    positions_RBL: Tensor


def keep_to_index(keep_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded gather indices and their mask, both [B, L] with L the longest kept row.

    Rows with fewer kept tokens are padded on the left with indices of dropped positions; the mask
    is 0 there.
    """
    length = int(keep_BS.sum(dim=1).max())
    order_BS = keep_BS.to(torch.uint8).argsort(dim=1, stable=True)
    order_BL = order_BS[:, order_BS.shape[1] - length :]
    return order_BL, keep_BS.gather(1, order_BL).to(torch.int64)


def full_positions(attention_mask_BS: Tensor) -> Tensor:
    """1-D positions of the unpruned prompt, [1, B, S]: what `generate` itself would make."""
    positions_BS = attention_mask_BS.to(torch.int64).cumsum(dim=1) - 1
    return positions_BS.clamp(min=0).unsqueeze(0)


def compact(
    *,
    input_ids_BS: Tensor,
    keep_BS: Tensor,
    positions_RBS: Tensor,
    policy: Positions,
    pad_id: int,
) -> Compacted:
    """Gathers ids and positions of the kept tokens; `keep_BS` is False at padding too.

    Padding gets `pad_id`: what was gathered there may be a dropped image placeholder, which the
    model would count.

    "keep" leaves positions as they were; "renumber" counts the kept tokens from 0. With several
    position rows (M-RoPE) only the text row may be renumbered, and it always is: transformers reads
    gaps there as borders between packed sequences.
    """
    order_BL, mask_BL = keep_to_index(keep_BS)
    ids_BL = input_ids_BS.gather(1, order_BL).masked_fill(mask_BL == 0, pad_id)
    rows = positions_RBS.shape[0]
    gathered_RBL = positions_RBS.gather(2, order_BL.unsqueeze(0).expand(rows, -1, -1))
    gathered_RBL = gathered_RBL * mask_BL
    if rows > 1 or policy == "renumber":
        gathered_RBL = gathered_RBL.clone()
        gathered_RBL[0] = full_positions(mask_BL)[0]
    return Compacted(input_ids_BL=ids_BL, attention_mask_BL=mask_BL, positions_RBL=gathered_RBL)
