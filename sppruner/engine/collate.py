"""Joins prompts that were processed one by one into the batch that a processor makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

# Entries with one row per prompt, padded on the left. All others are stacked by image, tile or
# patch, and padded at the end where images differ.
TOKEN_ENTRIES: Final = frozenset(
    {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
)


def collate(prompts: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """One batch of several prompts, all with the same entries."""
    names = prompts[0].keys()
    return {
        name: _pad_and_join(
            [prompt[name] for prompt in prompts],
            left=name in TOKEN_ENTRIES,
            value=pad_id if name == "input_ids" else 0,
        )
        for name in names
    }


def _pad_and_join(parts: Sequence[Tensor], *, left: bool, value: int) -> Tensor:
    sizes = [max(part.shape[d] for part in parts) for d in range(1, parts[0].dim())]
    padded = []
    for part in parts:
        missing = [size - held for size, held in zip(sizes, part.shape[1:], strict=True)]
        # `pad` counts from the last dimension, and takes (before, after) of each.
        amounts = [n for m in reversed(missing) for n in ((m, 0) if left else (0, m))]
        padded.append(pad(part, amounts, value=value) if any(missing) else part)
    return torch.cat(padded)
