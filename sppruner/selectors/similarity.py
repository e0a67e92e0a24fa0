"""Cosines between the tokens of an image, and what the greedy methods build on them.

Everything is fp32 and image by image where it multiplies matrices, so that a choice does not
depend on batch-mates, not even by a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sppruner.types import VisualTokens

NEVER = float("-inf")
# Rows per product: large enough for full speed, small enough to skip almost half of a square.
_BLOCK = 128


def encoder_states(image: VisualTokens) -> Tensor:
    """The tokens before the projector, or after it where it does not work token by token."""
    return image.features_ND if image.hidden_NV is None else image.hidden_NV


def products_NN(rows_ND: Tensor, out_NN: Tensor | None = None) -> Tensor:
    """Inner products of all pairs of rows. Only the blocks on and above the diagonal are computed;
    the rest is their mirror."""
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

    Rows computed lazily, one for each pick, would cost less arithmetic at small budgets, but are
    bound by memory: measured slower from about a fifth of the tokens kept, and for several images
    at any budget.
    """
    n = states[0].shape[0]
    cosine_INN = torch.empty(len(states), n, n, device=states[0].device)
    for cosine_NN, states_ND in zip(cosine_INN, states, strict=True):
        products_NN(normalize(states_ND.float(), dim=-1), out_NN=cosine_NN)
    return cosine_INN


def cosine_flops(tokens: int, width: int) -> int:
    """Modelled work of `cosines_INN` for one image: half of a square of products."""
    return tokens * (tokens + 1) * width


def mean_cosine(states_ND: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens, without forming the pairs; 1 for a single
    token. (|Σ u|² − N) / (N (N − 1)) for unit vectors u."""
    n = states_ND.shape[0]
    if n == 1:
        return torch.ones((), device=states_ND.device)
    total_D = normalize(states_ND.float(), dim=-1).sum(dim=0)
    return (total_D.square().sum() - n) / (n * (n - 1))


class Picks:
    """The tokens taken so far of every image, and how like one of them each token is.

    taken_IN: bool. nearest_IN: each token's largest cosine to a taken one, −1 before the first.
    """

    def __init__(self, cosine_INN: Tensor) -> None:
        self._cosine_INN = cosine_INN
        self.taken_IN = torch.zeros_like(cosine_INN[:, 0], dtype=torch.bool)
        self.nearest_IN = torch.full_like(cosine_INN[:, 0], -1.0)

    def take(self, score_IN: Tensor, active_I: Tensor) -> None:
        """Takes the best-scored token that is left, the first of equals, of each active image.
        No value leaves the device."""
        best_I1 = score_IN.masked_fill(self.taken_IN, NEVER).argmax(dim=1, keepdim=True)
        active_I1 = active_I[:, None]
        self.taken_IN.scatter_(1, best_I1, self.taken_IN.gather(1, best_I1) | active_I1)
        row_I1N = best_I1[:, :, None].expand(-1, -1, score_IN.shape[1])
        cosine_IN = self._cosine_INN.gather(1, row_I1N)[:, 0]
        # An inactive image's row is pushed below every cosine, so that it changes nothing.
        torch.maximum(
            self.nearest_IN, cosine_IN.masked_fill(~active_I1, NEVER), out=self.nearest_IN
        )

    def take_all(self, mask_IN: Tensor) -> None:
        """Takes every token of a mask."""
        self.taken_IN |= mask_IN
        for nearest_N, cosine_NN, mask_N in zip(
            self.nearest_IN, self._cosine_INN, mask_IN, strict=True
        ):
            # Column by column of a symmetric matrix: the maximum over the masked rows.
            likeness_N = cosine_NN.masked_fill(~mask_N, NEVER).amax(dim=1)
            torch.maximum(nearest_N, likeness_N, out=nearest_N)

    def scan(self, steps_I: Tensor, weight_IN: Tensor | float = 1.0) -> None:
        """Farthest-point sampling: takes `steps_I` more of each image, every time the token of
        largest (1 − nearest) · weight."""
        for step in range(int(steps_I.max())):
            self.take((1 - self.nearest_IN) * weight_IN, step < steps_I)


def absorb(
    features_ND: Tensor, weight_N: Tensor, into_C: Tensor, from_M: Tensor, alike_MC: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens `into_C` as weighted means of themselves and of the tokens `from_M` they are home to.

    A token's home is where `alike_MC` is largest. Returns the means [C, D] fp32 and which received
    any [C, 1] bool. weight_N: fp32, from 0; only ratios within a group count, however small the
    weights are. A group whose weights are all 0 gets its plain mean, which is what the weights
    plus ε tend to as ε falls to 0. One product instead of scattered additions: the same sum in the
    same order on every device.
    """
    home_M = alike_MC.argmax(dim=1)
    joins_CM = torch.arange(len(into_C), device=into_C.device)[:, None] == home_M
    own_C1, share_CM = weight_N[into_C, None], weight_N[from_M] * joins_CM
    total_C1 = own_C1 + share_CM.sum(dim=1, keepdim=True)
    # Below the least normal number weights have lost their digits.
    weightless_C1 = total_C1 < torch.finfo(total_C1.dtype).tiny
    own_C1 = own_C1.masked_fill(weightless_C1, 1.0)
    share_CM = torch.where(weightless_C1, joins_CM.to(share_CM.dtype), share_CM)
    total_C1 = own_C1 + share_CM.sum(dim=1, keepdim=True)
    mean_CD = own_C1 / total_C1 * features_ND[into_C].float()
    mean_CD = mean_CD + (share_CM / total_C1) @ features_ND[from_M].float()
    return mean_CD, joins_CM.any(dim=1, keepdim=True)


def closest(alike_MC: Tensor, count: int) -> Tensor:
    """The `count` rows of largest best value, the first of equals, best first."""
    return alike_MC.amax(dim=1).argsort(descending=True, stable=True)[:count]
