"""Cosines between the tokens of a plane, greedy subset selection, and merging.

All of it is fp32, and matrix products run image by image, so that a selection does not depend on
batch-mates, not even by rounding.

Shapes: I planes that are selected together, N tokens of each plane, D width of the features, C
target tokens and M source tokens of a merge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sppruner.selectors.base import mask_to_index
from sppruner.types import VisualTokens

NEVER = float("-inf")
# Rows per product: large enough for full speed, small enough to skip almost half of the square.
_BLOCK = 128


def encoder_states(image: VisualTokens) -> Tensor:
    """Encoder states of the tokens; projected features where the projector does not work token by
    token."""
    return image.features_ND if image.hidden_NV is None else image.hidden_NV


def products_NN(rows_ND: Tensor, out_NN: Tensor | None = None) -> Tensor:
    """Inner products of all pairs of rows. Only the blocks on and above the diagonal are computed
    and mirrored."""
    n = rows_ND.shape[0]
    if out_NN is None:
        out_NN = rows_ND.new_empty(n, n)
    for start in range(0, n, _BLOCK):
        rows = slice(start, start + _BLOCK)
        out_NN[rows, start:] = rows_ND[rows] @ rows_ND[start:].T
        out_NN[start + _BLOCK :, rows] = out_NN[rows, start + _BLOCK :].T
    return out_NN


def cosines_INN(states: Sequence[Tensor]) -> Tensor:
    """Cosines of all pairs of rows of each [N, D] member, as [I, N, N].

    Computing one row per selected token needs fewer FLOPs at small budgets but is memory-bound: it
    measures slower from about a fifth of the tokens kept, and for several images at any budget.
    """
    n = states[0].shape[0]
    cosine_INN = torch.empty(len(states), n, n, device=states[0].device)
    for cosine_NN, states_ND in zip(cosine_INN, states, strict=True):
        products_NN(normalize(states_ND.float(), dim=-1), out_NN=cosine_NN)
    return cosine_INN


def cosine_flops(tokens: int, width: int) -> int:
    """Modelled FLOPs of `cosines_INN` for one image: half of a square of products."""
    return tokens * (tokens + 1) * width


def mean_cosine(states_ND: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens, without forming the pairs; 1 for a single
    token. (|Σ u|² − N) / (N (N − 1)) for unit vectors u."""
    n = states_ND.shape[0]
    if n == 1:
        return torch.ones((), device=states_ND.device)
    total_D = normalize(states_ND.float(), dim=-1).sum(dim=0)
    return (total_D.square().sum() - n) / (n * (n - 1))


class GreedySubset:
    """Greedy selection of a subset of each image's tokens."""

    def __init__(self, cosine_INN: Tensor) -> None:
        self._cosine_INN = cosine_INN
        self.selected_IN = torch.zeros_like(cosine_INN[:, 0], dtype=torch.bool)
        """bool, True for the tokens selected so far."""
        self.nearest_IN = torch.full_like(cosine_INN[:, 0], -1.0)
        """Largest cosine of each token to a selected one; −1 before the first."""

    def add_best(self, score_IN: Tensor, active_I: Tensor) -> None:
        """Selects the best-scored remaining token of each active image, the first on ties. No value
        leaves the device."""
        best_I1 = score_IN.masked_fill(self.selected_IN, NEVER).argmax(dim=1, keepdim=True)
        active_I1 = active_I[:, None]
        self.selected_IN.scatter_(1, best_I1, self.selected_IN.gather(1, best_I1) | active_I1)
        row_I1N = best_I1[:, :, None].expand(-1, -1, score_IN.shape[1])
        cosine_IN = self._cosine_INN.gather(1, row_I1N)[:, 0]
        # Rows of inactive images are masked below every cosine and so leave `nearest_IN` unchanged.
        torch.maximum(
            self.nearest_IN, cosine_IN.masked_fill(~active_I1, NEVER), out=self.nearest_IN
        )

    def add_mask(self, mask_IN: Tensor) -> None:
        """Selects all tokens of a mask."""
        self.selected_IN |= mask_IN
        for nearest_N, cosine_NN, mask_N in zip(
            self.nearest_IN, self._cosine_INN, mask_IN, strict=True
        ):
            # The matrix is symmetric: its masked columns are the selected tokens' rows.
            cosine_N = cosine_NN.masked_fill(~mask_N, NEVER).amax(dim=1)
            torch.maximum(nearest_N, cosine_N, out=nearest_N)

    def add_farthest(self, steps_I: Tensor, weight_IN: Tensor | float = 1.0) -> None:
        """Farthest-point sampling: selects `steps_I` more tokens of each image, at each step the
        one of largest (1 − nearest) · weight."""
        for step in range(int(steps_I.max())):
            self.add_best((1 - self.nearest_IN) * weight_IN, step < steps_I)


def merge_tokens(
    features_ND: Tensor, weight_N: Tensor, target_C: Tensor, source_M: Tensor, similarity_MC: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges each source token into its most similar target token, by weighted means.

    Returns the means [C, D] fp32 and a bool [C, 1], True for targets that received a source.
    similarity_MC: of each source to each target. weight_N: fp32, from 0; only ratios within a group
    count. A group whose weights are all 0, or sum to less than the smallest normal number, gets its
    plain mean, the limit of weights plus ε as ε falls to 0. One matrix product replaces scattered
    additions, so that the order of the sum is the same on every device.
    """
    group_M = similarity_MC.argmax(dim=1)
    assigned_CM = torch.arange(len(target_C), device=target_C.device)[:, None] == group_M
    target_weight_C1, weight_CM = weight_N[target_C, None], weight_N[source_M] * assigned_CM
    total_C1 = target_weight_C1 + weight_CM.sum(dim=1, keepdim=True)
    # Subnormal weights have lost precision.
    zero_C1 = total_C1 < torch.finfo(total_C1.dtype).tiny
    target_weight_C1 = target_weight_C1.masked_fill(zero_C1, 1.0)
    weight_CM = torch.where(zero_C1, assigned_CM.to(weight_CM.dtype), weight_CM)
    total_C1 = target_weight_C1 + weight_CM.sum(dim=1, keepdim=True)
    mean_CD = target_weight_C1 / total_C1 * features_ND[target_C].float()
    mean_CD = mean_CD + (weight_CM / total_C1) @ features_ND[source_M].float()
    return mean_CD, assigned_CM.any(dim=1, keepdim=True)


def most_similar(similarity_MC: Tensor, count: int) -> Tensor:
    """Indices of the `count` source tokens most similar to any target, best first, earlier ones
    first on ties."""
    return similarity_MC.amax(dim=1).argsort(descending=True, stable=True)[:count]


def complement(index_K: Tensor, size: int) -> Tensor:
    """The indices of 0 … size − 1 that `index_K` lacks, ascending."""
    is_left_N = torch.ones(size, dtype=torch.bool, device=index_K.device)
    is_left_N[index_K] = False
    return mask_to_index(is_left_N)
