"""PruneSID: semantic groups from principal components, then suppression within each group
(arXiv 2603.09480).

    groups      X = σ(states) centred, N × D; its first G = ⌊K / 4⌋ left singular vectors, at
                most D − 1, are the columns of V; a token belongs to the one of its largest |V|
    score       of a token within its group: its saliency, or its loading |V|
    suppression in every group, best score first, a token survives unless its cosine to a survivor
                of the group is above τ
                  llava   τ = K / 32 · ρ            ρ = mean cosine over all pairs of tokens
                  qwen    τ = max(18 K / N, 1) · m  m = (ρ (N − 1) / 2 + 1) / N, about ρ / 2
    quotas      at least 1 and at most min(5 ⌈K / 64⌉, survivors) tokens of a group, the bounds
                raised for all alike (up to the group's size) until they hold K; what is above 1
                each is shared by survivors, or by size
    kept        of each group its quota: survivors by score, then suppressed tokens by score

Paper and released code differ, the code for LLaVA and that for Qwen2-VL differ too, and all of it
is options:

                      paper       code for LLaVA    code for Qwen2-VL
    features          encoder     encoder           projected: behind the merger
    score             loading     attention (CLS)   loading
    tau_mode          llava       llava             qwen
    center            feature     token             token
    quota             size        survivors         survivors

features: "encoder" is the states in front of the projector, where there are such of each token.
center: "token" subtracts each token's mean over its features, "feature" each feature's mean over
the tokens. An "auto" is the code's for the model at hand: that for LLaVA where saliency is the row
of a CLS token and each token is one patch (LLaVA, LLaVA-NeXT), that for Qwen2-VL where tokens join
several patches or no token attends for all (the Qwen families, InternVL, Idefics3, SmolVLM,
LLaVA-OneVision), of which the authors have run Qwen2-VL alone. The published figures were measured
with LLaVA's. With its threshold τ is above 1, and nothing is suppressed, as soon as ρ is above
32 / K.

On the same features the choice is that of the code but for: an exact decomposition, in fp64, where
the code draws a randomised one; raster order; the CLS token, which LLaVA's code keeps, is not, and
its place goes to a patch; the count, which is the budget's, where Qwen's code keeps at least 16
tokens and prunes no image of 16 or fewer (a budget's min_keep=16 does so), and no fewer than four
groups, which only its own minimum makes possible. Suppression holds one row of cosines for each
group's present best instead of a matrix for each group.

Dynamic budgets. The paper gives an image tokens in proportion to φ = 1 − ρ at an equal average over
the batch. Here a budget with `spread` gives it φ / usual_information times its part instead: what
an image keeps must not depend on its batch-mates, or an answer would change with the batch it
happened to be in. Its default 0.5 is the middle of φ's range for tokens that are not opposed on
average; for budgets that hold on average, set it to the mean of φ over a sample of one's images
(the embedded model's scenes: 0.43, standard deviation 0.05).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import Tensor

from sppruner.capabilities import Capabilities
from sppruner.errors import SpecError
from sppruner.selectors.base import from_mask, saliency_IN
from sppruner.selectors.options import SaliencyOption, one_of
from sppruner.selectors.similarity import (
    cosine_flops,
    cosines_INN,
    encoder_states,
    mean_cosine,
    products_NN,
)
from sppruner.spec import Budget
from sppruner.types import Selection, VisualTokens

# What "auto" stands for, by whose code it is.
_LLAVA: Final = {"features": "encoder", "score": "attention", "tau_mode": "llava"}
_QWEN: Final = {"features": "projected", "score": "loading", "tau_mode": "qwen"}


@dataclass(frozen=True, kw_only=True)
class PruneSIDSelector(SaliencyOption):
    """See the module's docstring. saliency only counts where score is "attention". Without a
    model to fill them in (`on`), "auto" options are those of the code for LLaVA."""

    name: ClassVar[str] = "prunesid"
    features: str = "auto"
    center: str = "token"
    score: str = "auto"
    tau_mode: str = "auto"
    quota: str = "survivors"
    usual_information: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "features", ("auto", "encoder", "projected"))
        one_of(self, "center", ("token", "feature"))
        one_of(self, "score", ("auto", "attention", "loading"))
        one_of(self, "tau_mode", ("auto", "llava", "qwen"))
        one_of(self, "quota", ("survivors", "size"))
        if self.usual_information <= 0:
            raise SpecError(
                f"usual_information={self.usual_information!r} divides an image's own: "
                "use a mean of 1 - cosine, above 0"
            )

    @property
    def signals(self) -> frozenset[str]:
        return frozenset() if self.score == "loading" else super().signals

    def on(self, can: Capabilities) -> PruneSIDSelector:
        code = _LLAVA if can.attention == "cls" and not can.merged else _QWEN

        def filled(option: str) -> str:
            said: str = getattr(self, option)
            return code[option] if said == "auto" else said

        return replace(
            self,
            features=filled("features"),
            score=filled("score"),
            tau_mode=filled("tau_mode"),
        )

    def check(self, budget: Budget, can: Capabilities) -> None:
        """Any budget, with spread or without."""

    def information(self, planes: Sequence[VisualTokens]) -> float:
        """φ over the usual φ; of an image of several planes, their mean weighted by tokens."""
        held = sum(plane.count * (1 - float(mean_cosine(self._states(plane)))) for plane in planes)
        return held / sum(plane.count for plane in planes) / self.usual_information

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        states = [self._states(image) for image in images]
        # Centred states of D features have D − 1 components; what is beyond them is arbitrary.
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
        left_IG = (member_IGN & survives_IN[:, None]).sum(dim=2)
        weight_IG = left_IG if self.quota == "survivors" else size_IG
        tables = torch.stack([size_IG, left_IG, weight_IG], dim=1).tolist()
        quota_IG = torch.tensor([quotas(k, *t) for k, t in zip(counts, tables, strict=True)])

        # Group by group, survivors first, best score first: a quota is then a prefix.
        n = group_IN.shape[1]
        key_IN = (2 * group_IN + ~survives_IN) * n + order_IN.argsort(dim=1)
        queue_IN = key_IN.argsort(dim=1)
        start_IG = size_IG.cumsum(dim=1) - size_IG
        place_IN = queue_IN.argsort(dim=1) - start_IG.gather(1, group_IN)
        kept_IN = place_IN < quota_IG.to(group_IN.device).gather(1, group_IN)
        return [Selection(index_K=from_mask(kept_N)) for kept_N in kept_IN]

    def _states(self, image: VisualTokens) -> Tensor:
        return image.features_ND if self.features == "projected" else encoder_states(image)

    def _components(self, states_ND: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Group and loading of each token, [N] each. Left singular vectors of X are eigenvectors of
        X Xᵀ; in fp64, since that squares the singular values."""
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
        """Two squares of products, and 9 N³ for a symmetric eigendecomposition, counting the
        encoder's states as if they had the features' width."""
        return 2 * cosine_flops(tokens, width) + 9 * tokens**3


def _suppress(group_IN: Tensor, order_IN: Tensor, cosine_INN: Tensor, tau_I: Tensor) -> Tensor:
    """Which tokens survive in their groups, [I, N] bool; all groups of all images take their next
    survivor together. One value leaves the device: the size of the largest group."""
    n = group_IN.shape[1]
    rank_IN = order_IN.argsort(dim=1)
    waiting_IN = torch.ones_like(group_IN, dtype=torch.bool)
    survives_IN = torch.zeros_like(waiting_IN)
    largest = int(torch.zeros_like(group_IN).scatter_add(1, group_IN, rank_IN * 0 + 1).max())
    for _ in range(largest):
        # The best waiting token of each group, by its rank; n where none waits.
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
    """How many of `k` tokens each group gives; groups may be empty, but not more than k are not.

    Shares of `weights` are differences of rounded running sums, so they add up; what bounds cut off
    goes to the groups with most survivors. The sums are fp32, as in the code: many come out half
    way between two counts, and its roundings are then what decides.
    """
    bound = 5 * math.ceil(k / 64)
    most = [min(bound, left) for left in survivors]
    while sum(most) < k:
        most = [min(m + 1, size) for m, size in zip(most, sizes, strict=True)]
    given = [min(1, size) for size in sizes]
    extra = k - sum(given)
    parts = torch.tensor(weights) / sum(weights)
    running = (parts.cumsum(dim=0) * extra).round().int()
    for g, share in enumerate(running.diff(prepend=running.new_zeros(1)).tolist()):
        given[g] = min(given[g] + share, most[g])
    for g in sorted(range(len(sizes)), key=lambda g: -survivors[g]):
        given[g] += min(most[g] - given[g], k - sum(given))
    return given
