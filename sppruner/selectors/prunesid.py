"""PruneSID: semantic groups from principal components, then suppression within each group
(arXiv 2603.09480).

    groups      X = σ(states) centred, N × D; its first G = ⌊K / 4⌋ left singular vectors, at
                most D − 1, are the columns of V; a token belongs to the component of its largest
                |V|
    score       of a token within its group: its saliency, or its loading |V|
    suppression in each group, best score first, a token survives unless its cosine to a survivor of
                the group exceeds τ
                  llava   τ = K / 32 · ρ            ρ = mean cosine over all pairs of tokens
                  qwen    τ = max(18 K / N, 1) · m  m = (ρ (N − 1) / 2 + 1) / N, about ρ / 2
    quotas      at least 1 and at most min(5 ⌈K / 64⌉, survivors) tokens of each group; the upper
                bounds of all groups grow equally (up to the group's size) until they sum to K;
                tokens beyond 1 per group are shared in proportion to survivors, or to size
    kept        the quota of each group: survivors by score, then suppressed tokens by score

The paper, the released code for LLaVA and that for Qwen2-VL differ; each difference is an option:

                      paper       code for LLaVA    code for Qwen2-VL
    features          encoder     encoder           projected: after the merger
    score             loading     attention (CLS)   loading
    tau_mode          llava       llava             qwen
    center            feature     token             token
    quota             size        survivors         survivors

features="auto" selects the states that the code for such tokens groups: "projected" where a token
merges several patches (the Qwen families, InternVL, Idefics3, SmolVLM), "encoder" elsewhere. The
other defaults are those of the code for LLaVA, with which the published figures were measured; τ
exceeds 1 there, and nothing is suppressed, once ρ exceeds 32 / K. They are the stronger choice for
merged tokens too: on tiny-qwen with 11.1 % of the tokens 89.7 % of the dense accuracy (87.9 – 91.6,
2,011 questions), where the code for Qwen2-VL (score=loading, tau_mode=qwen), the only Qwen model
that the authors ran, keeps 78.3 % (75.8 – 80.9), and encoder states keep 84.6 % (82.5 – 86.8).

On the same features the selection equals that of the code, except for: an exact decomposition in
fp64, where the code's is randomised; raster order; the CLS token, which LLaVA's code keeps, is not
kept, and its place in the budget goes to a patch; the count, which is the budget's, where Qwen's
code keeps at least 16 tokens and does not prune images of 16 or fewer (a budget's min_keep=16 does
the same), and at least four groups, which only that minimum makes possible. Suppression holds one
row of cosines for the current best token of each group instead of a matrix per group.

Dynamic budgets. The paper gives an image tokens in proportion to φ = 1 − ρ, with a fixed average
over the batch. Here a budget with `spread` multiplies an image's part by φ / usual_information
instead, because what an image keeps must not depend on its batch-mates: an answer would change with
its batch. The default of 0.5 is the middle of φ's range for tokens that are not opposed on average;
for budgets that hold on average, set it to the mean of φ over a sample of images (on the embedded
model's scenes 0.45, standard deviation 0.06).

Shapes: I planes that are selected together, N tokens of each plane, D width of the states, G
groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.capabilities import Capabilities
from sppruner.errors import SpecError
from sppruner.selectors.base import mask_to_index
from sppruner.selectors.options import SaliencyOption, check_choice
from sppruner.selectors.saliency import saliency_IN
from sppruner.selectors.similarity import (
    cosine_flops,
    cosines_INN,
    encoder_states,
    mean_cosine,
    products_NN,
)
from sppruner.spec import Budget
from sppruner.types import Selection, VisualTokens

_LEAST_INFORMATION = 1e-6


@dataclass(frozen=True, kw_only=True)
class PruneSIDSelector(SaliencyOption):
    """Groups, suppression and quotas.

    `saliency` has an effect only if `score` is "attention". A selector that is not resolved for a
    model (`resolve_for`) treats features="auto" as "encoder".
    """

    name: ClassVar[str] = "prunesid"

    features: str = "auto"
    """The states that are grouped: "encoder", those before the projector where each token has some;
    "projected"; or "auto"."""

    center: str = "token"
    """What is subtracted: "token", each token's mean over its features, or "feature", each
    feature's mean over the tokens."""

    score: str = "attention"
    """How tokens of a group are ranked: "attention" (saliency) or "loading" (|V|)."""

    tau_mode: str = "llava"
    """The formula of the threshold τ: "llava" or "qwen"."""

    quota: str = "survivors"
    """What a group's quota is in proportion to: "survivors" or "size"."""

    usual_information: float = 0.5
    """The φ, at least 1e-6, at which a budget with `spread` gives an image exactly its part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "features", ("auto", "encoder", "projected"))
        check_choice(self, "center", ("token", "feature"))
        check_choice(self, "score", ("attention", "loading"))
        check_choice(self, "tau_mode", ("llava", "qwen"))
        check_choice(self, "quota", ("survivors", "size"))
        if not self.usual_information >= _LEAST_INFORMATION:
            raise SpecError(
                f"usual_information={self.usual_information!r} is a divisor: use a mean of "
                f"1 - cosine, at least {_LEAST_INFORMATION:g}"
            )

    @property
    def signals(self) -> frozenset[str]:
        return frozenset() if self.score == "loading" else super().signals

    def resolve_for(self, can: Capabilities) -> PruneSIDSelector:
        if self.features != "auto":
            return self
        return replace(self, features="projected" if can.merged else "encoder")

    def check(self, budget: Budget, can: Capabilities) -> None:
        """Accepts every budget, with or without spread."""

    def information(self, planes: Sequence[VisualTokens]) -> float:
        """φ over the usual φ; for several planes, their mean weighted by tokens."""
        total = sum(plane.count * (1 - float(mean_cosine(self._states(plane)))) for plane in planes)
        return total / sum(plane.count for plane in planes) / self.usual_information

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        states = [self._states(image) for image in images]
        # Centred states of D features have D − 1 components; further ones are arbitrary.
        groups = [max(1, min(k // 4, states[0].shape[1] - 1)) for k in counts]
        psca = [self._components(s, g) for s, g in zip(states, groups, strict=True)]
        group_IN = torch.stack([group_N for group_N, _ in psca])
        if self.score == "loading":
            score_IN = torch.stack([loading_N for _, loading_N in psca])
        else:
            score_IN = saliency_IN(images, self.saliency)
        order_IN = score_IN.argsort(dim=1, descending=True, stable=True)
        tau_I = torch.stack([self._tau(s, k) for s, k in zip(states, counts, strict=True)])
        survives_IN = _suppress(group_IN, order_IN, cosines_INN(states), tau_I)

        member_IGN = group_IN[:, None] == torch.arange(max(groups), device=group_IN.device)[:, None]
        size_IG = member_IGN.sum(dim=2)
        survivors_IG = (member_IGN & survives_IN[:, None]).sum(dim=2)
        weight_IG = survivors_IG if self.quota == "survivors" else size_IG
        tables = torch.stack([size_IG, survivors_IG, weight_IG], dim=1).tolist()
        quota_IG = torch.tensor([quotas(k, *t) for k, t in zip(counts, tables, strict=True)])

        # Sorted by group, then survivors first, then best score first, so that a quota is a prefix.
        n = group_IN.shape[1]
        key_IN = (2 * group_IN + ~survives_IN) * n + order_IN.argsort(dim=1)
        sorted_IN = key_IN.argsort(dim=1)
        start_IG = size_IG.cumsum(dim=1) - size_IG
        rank_IN = sorted_IN.argsort(dim=1) - start_IG.gather(1, group_IN)
        kept_IN = rank_IN < quota_IG.to(group_IN.device).gather(1, group_IN)
        return [Selection(index_K=mask_to_index(kept_N)) for kept_N in kept_IN]

    def _states(self, image: VisualTokens) -> Tensor:
        return image.features_ND if self.features == "projected" else encoder_states(image)

    def _components(self, states_ND: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Group and loading of each token, [N] each. The left singular vectors of X are
        eigenvectors of X Xᵀ; in fp64, since X Xᵀ squares the singular values."""
        x_ND = states_ND.double().sigmoid()
        x_ND = x_ND - x_ND.mean(dim=1 if self.center == "token" else 0, keepdim=True)
        vectors_NN = torch.linalg.eigh(products_NN(x_ND)).eigenvectors
        loading_NG = vectors_NN.flip(1)[:, :groups].abs()
        loading_N, group_N = loading_NG.max(dim=1)
        return group_N, loading_N.float()

    def _tau(self, states_ND: Tensor, k: int) -> Tensor:
        n, rho = len(states_ND), mean_cosine(states_ND)
        if self.tau_mode == "qwen":
            return max(18 * k / n, 1.0) * (rho * (n - 1) / 2 + 1) / n
        return k / 32 * rho

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """Two squares of products, and 9 N³ for a symmetric eigendecomposition, with encoder states
        counted at the features' width."""
        return 2 * cosine_flops(tokens, width) + 9 * tokens**3


def _suppress(group_IN: Tensor, order_IN: Tensor, cosine_INN: Tensor, tau_I: Tensor) -> Tensor:
    """Tokens that survive in their groups, [I, N] bool; each step finds the next survivor of all
    groups of all images. One value leaves the device: the size of the largest group."""
    n = group_IN.shape[1]
    rank_IN = order_IN.argsort(dim=1)
    waiting_IN = torch.ones_like(group_IN, dtype=torch.bool)
    survives_IN = torch.zeros_like(waiting_IN)
    largest = int(torch.zeros_like(group_IN).scatter_add(1, group_IN, rank_IN * 0 + 1).max())
    for _ in range(largest):
        # Rank of each group's best waiting token; n where none is waiting.
        best_IG = torch.full_like(rank_IN, n).scatter_reduce(
            1, group_IN, rank_IN.masked_fill(~waiting_IN, n), "amin"
        )
        best_IN = best_IG.gather(1, group_IN)
        next_IN = waiting_IN & (rank_IN == best_IN)
        survives_IN |= next_IN
        leader_IN = order_IN.gather(1, best_IN.clamp(max=n - 1))
        cosine_IN = cosine_INN.gather(2, leader_IN[:, :, None])[:, :, 0]
        waiting_IN = waiting_IN & ~next_IN & (cosine_IN <= tau_I[:, None])
    return survives_IN


def quotas(
    k: int, sizes: Sequence[int], survivors: Sequence[int], weights: Sequence[int]
) -> list[int]:
    """Kept tokens of each group, `k` in total. Groups may be empty; at most k of them are not.

    Shares of `weights` are differences of rounded running sums, so they add up; tokens that the
    upper bounds cut off go to the groups with most survivors. The sums are fp32, as in the code:
    many lie half way between two counts, where its rounding decides.
    """
    bound = 5 * math.ceil(k / 64)
    upper = [min(bound, count) for count in survivors]
    while sum(upper) < k:
        upper = [min(u + 1, size) for u, size in zip(upper, sizes, strict=True)]
    quota = [min(1, size) for size in sizes]
    extra = k - sum(quota)
    parts = torch.tensor(weights) / sum(weights)
    running = (parts.cumsum(dim=0) * extra).round().int()
    for g, share in enumerate(running.diff(prepend=running.new_zeros(1)).tolist()):
        quota[g] = min(quota[g] + share, upper[g])
    for g in sorted(range(len(sizes)), key=lambda g: -survivors[g]):
        quota[g] += min(upper[g] - quota[g], k - sum(quota))
    return quota
