"""Re-packs prompts in front of the decoder: from a keep mask to left-padded, gathered tensors.

`generate` expects left padding. One stable argsort keeps the order of the kept tokens without a
loop over rows.

Shapes: B batch rows, S length of the prompts, L length of the longest kept row, R rows of position
ids: one (1-D RoPE) or four (text, time, height, width; M-RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sppruner.spec import Positions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compacted:
    """A shortened batch, padded on the left."""

    input_ids_BL: Tensor
    """int64 token ids; `pad_id` at padding."""

    attention_mask_BL: Tensor
    """int64, 1 for tokens and 0 at padding."""

    positions_RBL: Tensor
    """int64 position ids; 0 at padding."""


def keep_to_index(keep_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded gather indices and their mask, both [B, L] with L the longest kept row.

    Rows with fewer kept tokens are padded on the left with indices of dropped tokens; the mask is 0
    there.
    """
    length = int(keep_BS.sum(dim=1).max())
    order_BS = keep_BS.to(torch.uint8).argsort(dim=1, stable=True)
    order_BL = order_BS[:, order_BS.shape[1] - length :]
    return order_BL, keep_BS.gather(1, order_BL).to(torch.int64)


def full_positions(attention_mask_BS: Tensor) -> Tensor:
    """1-D positions of the unpruned prompt, [1, B, S], as `generate` itself makes them."""
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

    Padding gets `pad_id`: the gathered id there may be a dropped image placeholder, which the model
    would count.

    policy: "keep" leaves positions unchanged; "renumber" counts the kept tokens from 0. Of four
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
