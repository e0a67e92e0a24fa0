"""Saliency of tokens: how much an image draws attention to each, whatever the question.

Shapes: I planes that are selected together, N tokens of each plane, V width of the encoder states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from sppruner.selectors.similarity import encoder_states
from sppruner.signals import ATTENTION, CLS_ATTENTION, RECEIVED_ATTENTION
from sppruner.types import VisualTokens

SALIENCY: Final[dict[str, frozenset[str]]] = {
    "attention": frozenset({ATTENTION}),
    "cls": frozenset({CLS_ATTENTION}),
    "received": frozenset({RECEIVED_ATTENTION}),
    "feature": frozenset(),
}
"""The values of the `saliency` option, and the signal that each reads."""


def min_max_IN(values_IN: Tensor) -> Tensor:
    """The values of each image scaled to [0, 1]; constant values become 0."""
    low_I1 = values_IN.amin(dim=1, keepdim=True)
    span_I1 = values_IN.amax(dim=1, keepdim=True) - low_I1
    return (values_IN - low_I1) / span_I1.clamp(min=1e-12)


def feature_saliency_IN(images: Sequence[VisualTokens]) -> Tensor:
    """Saliency without attention: cosine distance of each token from the image's mean token,
    smoothed by a 3×3 mean filter."""
    maps = []
    for image in images:
        states_NV = encoder_states(image).float()
        mean_1V = states_NV.mean(dim=0, keepdim=True)
        distance_N = 1 - torch.nn.functional.cosine_similarity(states_NV, mean_1V, dim=1)
        rows, columns = image.grid
        grid = distance_N.new_zeros(rows, columns)
        occupied = distance_N.new_zeros(rows, columns)
        row_N, column_N = image.coords_N2.unbind(dim=1)
        grid[row_N, column_N] = distance_N
        occupied[row_N, column_N] = 1.0
        summed = torch.nn.functional.avg_pool2d(grid[None, None], 3, 1, 1, divisor_override=1)
        neighbours = torch.nn.functional.avg_pool2d(
            occupied[None, None], 3, 1, 1, divisor_override=1
        )
        maps.append((summed / neighbours.clamp(min=1))[0, 0][row_N, column_N])
    return torch.stack(maps)


def saliency_IN(images: Sequence[VisualTokens], source: str) -> Tensor:
    """Saliency [I, N] from a source in `SALIENCY`: "attention" is the family's saliency signal (the
    CLS token's attention row where there is one, else received attention), "feature" needs no
    attention."""
    if source == "feature":
        return feature_saliency_IN(images)
    (signal,) = SALIENCY[source]
    return torch.stack([image.signals[signal].float() for image in images])
