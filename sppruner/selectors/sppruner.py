"""SPpruner-R: focus on the subjects, then restore their context.

SPpruner is arXiv 2605.20950 ("Focus-then-Context: Subject-Centric Progressive Visual Token
Reduction for Vision-Language Models"). Only its abstract is public to us: two modules in sequence,
a focus identification that models the interplay of visual saliency and semantic relevance, and a
context-aware structural scan that gathers cues from neighbouring regions. Everything below that
sentence is our reconstruction, hence the R: the algebra, the constants and the merging are ours.

    s, r          saliency and relevance of each token, min-max scaled to [0, 1] per image
    agreement     a = (s^β r^α)^(1/(α+β))           both are high; without `root`, s^β r^α
    spectrum      o = 1 − (1 − s)(1 − η r)          either is high
    interplay     φ = λ a + (1 − λ) o
    coherence     φ' = (1 − μ) φ + μ · cosine-weighted mean of φ over the 8 neighbours
    focus F       greedy by φ' with a soft penalty on tokens similar to selected ones, until F holds
                  ρ of the energy Σφ'^energy, between focus_min and focus_max of the budget
    context C     greedy by novelty · (ε + proximity)^ω, after one pass over empty windows
    aggregation   the most similar dropped tokens are averaged into C, norms restored

An instruction may not name anything in the image ("Describe the image."), and its relevance then
hardly differs between tokens. The scale of relevance depends on the model, so its spread is
measured in units of chance: the cosine with a random direction of the D features has the standard
deviation sqrt((1 − |mean unit feature|²) / D) over the tokens, and the mean of T such cosines 1/√T
of it. Text is used if the standard deviation of its relevance exceeds relevance_floor times the
former; the default, a quarter, is the chance spread of 16 unrelated words. On the embedded model
that instruction spreads 0.03 of chance, and kinds of questions that name things 0.4 to 1.3 on
average.

`jobs/tune.py` chose the constants on the tuning scenes of the embedded LLaVA, at 33.3, 22.2 and
11.1 %: 99.7 % of dense accuracy on 600 questions, where values argued beforehand (λ=0.5, η=1,
μ=0.3, four windows) had 99.3 %. On 3,000 further tuning questions the two sets did not differ
measurably (0.03 to 0.07 points, intervals on both sides of 0), so the cheaper one is kept, which
computes no coherence. Merging did not differ measurably from no merging either; it is kept as the
last step of restoring context (kappa=0 turns it off).

Limits: λ=1, μ=0, ω=0, windows=0, redundancy=1, no root, energy 1, percentile 1, an infinite σ and
no norms restored is FSR; focus 0, ω=0 and windows=0 is farthest-point sampling, DivPrune with
another seed, since an image without focus starts its context at the token of largest φ'; focus 1
with λ=0, η=0, μ=0 and redundancy 1 is the top of saliency.

Shapes: I planes that are selected together, N tokens of each plane, D width of the features, V
width of the encoder states, K kept, C context and M dropped tokens, W windows. In grids R is rows
and C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sppruner.capabilities import Capabilities
from sppruner.errors import SpecError
from sppruner.selectors.base import mask_to_index, min_max_IN, saliency_IN
from sppruner.selectors.options import RelevanceOptions, SaliencyOption, check_range, relevance_IN
from sppruner.selectors.similarity import (
    NEVER,
    GreedySubset,
    complement,
    cosine_flops,
    cosines_INN,
    encoder_states,
    merge_tokens,
    most_similar,
)
from sppruner.selectors.staged import check_stages
from sppruner.spec import Budget
from sppruner.stages import TokenSchedule
from sppruner.types import Selection, VisualTokens

# Each pair of neighbours once: right, down, and both diagonals down.
_BESIDE = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True, kw_only=True)
class SPprunerSelector(SaliencyOption, RelevanceOptions):
    """Focus, context and aggregation."""

    name: ClassVar[str] = "sppruner"

    mode: str = "pre"
    """"pre" spends the budget in front of the decoder. With "pre+mid" it is the average over the
    decoder's layers: 1.5 times as many tokens enter, and in front of the middle layer 0.5 times as
    many are kept, by the attention of the last prompt token in the layer before; the split of
    VScan."""

    relevance_floor: float = 0.25
    """Least spread of relevance at which text is used, from 0, in units of chance; at 0 every text
    whose relevance differs between tokens is used."""

    percentile: float = 0.99
    """Quantile, 0 to 1, at which saliency is clipped: a few outliers of CLIP would otherwise
    compress all other values."""

    alpha: float = 1.0
    """α, from 0: the exponent of relevance in the agreement."""

    beta: float = 1.0
    """β, from 0: the exponent of saliency in the agreement; α and β are not both 0."""

    root: bool = True
    """Whether the agreement is the (α+β)-th root of the product."""

    eta: float = 0.5
    """η, 0 to 1: the weight of relevance in the spectrum."""

    lam: float = 0.75
    """λ, 0 to 1: the share of agreement in the interplay; 0 for images whose text is not used."""

    mu: float = 0.0
    """μ, 0 to 1: the share of the neighbours' mean in the coherence."""

    rho: float = 0.8
    """ρ, 0 to 1: the share of the energy that the focus holds."""

    energy: float = 2.0
    """Exponent of φ' in the energy, from 0."""

    focus_min: float = 0.35
    """Least share of the budget for the focus, 0 to 1."""

    focus_max: float = 0.65
    """Largest share of the budget for the focus, 0 to 1, not below `focus_min`."""

    redundancy: float = 0.9
    """Cosine with a focus token, −1 to 1, above which the score of a token falls, to 0 at cosine
    1."""

    windows: int = 3
    """Windows along each side of the grid in the coverage pass; 0 leaves the pass out."""

    sigma: float = 0.1
    """σ, above 0: the reach of a subject, as a share of the longer grid side."""

    proximity_floor: float = 0.1
    """ε, from 0: added to proximity, so that tokens far from subjects can be selected."""

    omega: float = 0.5
    """ω, from 0: the exponent of proximity."""

    kappa: float = 1.0
    """κ, from 0: dropped tokens that are merged per context token; 0 merges none."""

    restore_norm: bool = True
    """Whether a merged token is scaled to the norm of its features before merging."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("percentile", "eta", "lam", "mu", "rho", "focus_min", "focus_max"), 0, 1)
        free = ("relevance_floor", "alpha", "beta", "windows", "proximity_floor", "omega", "kappa")
        check_range(self, (*free, "energy"), 0, float("inf"))
        check_range(self, ("redundancy",), -1, 1)
        if self.focus_min > self.focus_max:
            raise SpecError("focus_min and focus_max are shares with focus_min <= focus_max")
        if self.alpha + self.beta == 0:
            raise SpecError("alpha and beta are both 0: set one of them above 0")
        if self.sigma <= 0:
            raise SpecError(f"sigma={self.sigma!r} is a reach: use a share above 0")
        if self.mode not in ("pre", "pre+mid"):
            raise SpecError(f"mode={self.mode!r} of 'sppruner': use 'pre' or 'pre+mid'")

    @property
    def staged(self) -> bool:
        return self.mode == "pre+mid"

    def check(self, budget: Budget, can: Capabilities) -> None:
        super().check(budget, can)
        if self.staged:
            check_stages(self.name, [can.decoder_layers // 2], can)

    def schedule(self, n: int, k: int, layers: int) -> TokenSchedule:
        """With "pre+mid", 1.5 k tokens up to the middle layer and 0.5 k from there on.

        The average is exactly k: where halves are not whole numbers, or there are fewer than 1.5 k
        tokens, the two counts are as far apart as whole numbers with that average can be.
        """
        if not self.staged or k >= n:
            return super().schedule(n, k, layers)
        middle = layers // 2
        common = gcd(middle, layers - middle)
        more, fewer = (layers - middle) // common, middle // common
        moves = min(k // (2 * more), (n - k) // more)
        stages = ((middle, k - moves * fewer),) if moves else ()
        return TokenSchedule(before=k + moves * more, counted=k, stages=stages)

    def decoder_entry_bounds(self, n: int, k: int) -> tuple[int, int]:
        """With "pre+mid", the excess over `k` depends on the position of the decoder's middle
        layer."""
        most = min(n, k + k // 2) if self.staged else k
        return k, most

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        grid = images[0].grid
        phi_IN = self._interplay(images, grid)
        subset = GreedySubset(cosine_INN := cosines_INN([image.features_ND for image in images]))
        budget_I = torch.tensor(counts, device=phi_IN.device)
        self._focus(phi_IN, budget_I, subset)
        focus_IN = subset.selected_IN.clone()
        self._context(phi_IN, budget_I, subset, grid)
        selections = []
        for i, image in enumerate(images):
            index_K = mask_to_index(subset.selected_IN[i])
            replaced_KD = None
            if self.kappa > 0:
                context_C = mask_to_index(subset.selected_IN[i] & ~focus_IN[i])
                replaced_KD = self._aggregate(image, phi_IN[i], cosine_INN[i], index_K, context_C)
            selections.append(
                Selection(index_K=index_K, replace_KD=replaced_KD, focus_K=focus_IN[i, index_K])
            )
        return selections

    def _interplay(self, images: Sequence[VisualTokens], grid: tuple[int, int]) -> Tensor:
        """φ' of each token, [I, N]."""
        raw_IN = saliency_IN(images, self.saliency)
        ceiling_I1 = raw_IN.quantile(self.percentile, dim=1, keepdim=True)
        salient_IN = min_max_IN(raw_IN.minimum(ceiling_I1))

        text_IN = relevance_IN(images)
        chance_I = torch.stack([_chance_spread(image.features_ND) for image in images])
        informative_I = text_IN.std(dim=1) > self.relevance_floor * chance_I
        relevant_IN = min_max_IN(text_IN) * informative_I[:, None]
        lam_I1 = self.lam * informative_I[:, None]

        both_IN = salient_IN**self.beta * relevant_IN**self.alpha
        if self.root:
            both_IN = both_IN ** (1 / (self.alpha + self.beta))
        either_IN = 1 - (1 - salient_IN) * (1 - self.eta * relevant_IN)
        phi_IN = lam_I1 * both_IN + (1 - lam_I1) * either_IN
        if self.mu == 0:
            return phi_IN
        around = [
            _neighbourhood(phi_N.view(grid), encoder_states(image).view(*grid, -1))
            for phi_N, image in zip(phi_IN, images, strict=True)
        ]
        return (1 - self.mu) * phi_IN + self.mu * torch.stack(around).flatten(1)

    def _focus(self, phi_IN: Tensor, budget_I: Tensor, subset: GreedySubset) -> None:
        """Selects the focus."""
        energy_IN = (phi_IN**self.energy).sort(dim=1, descending=True).values.cumsum(dim=1)
        enough_I = (energy_IN < self.rho * energy_IN[:, -1:]).sum(dim=1) + 1
        low_I = (self.focus_min * budget_I).round().long()
        high_I = (self.focus_max * budget_I).round().long()
        wanted_I = enough_I.clamp(min=low_I, max=high_I)
        slack = 1 - self.redundancy
        for step in range(int(wanted_I.max())):
            score_IN = phi_IN
            if slack > 0:
                excess_IN = (subset.nearest_IN - self.redundancy) / slack
                score_IN = phi_IN * (1 - excess_IN.clamp(0, 1))
            subset.add_best(score_IN, step < wanted_I)

    def _context(
        self, phi_IN: Tensor, budget_I: Tensor, subset: GreedySubset, grid: tuple[int, int]
    ) -> None:
        """Selects the context: tokens unlike all selected ones, with a preference for those near a
        subject."""
        subject_IN = phi_IN * subset.selected_IN
        proximity_IN = self._proximity(subject_IN.view(-1, *grid)).flatten(1)
        weight_IN = (self.proximity_floor + proximity_IN) ** self.omega
        # Without a focus all tokens are equally novel; the one of largest φ' is then the seed.
        subset.add_best(phi_IN, ~subset.selected_IN.any(dim=1))
        if self.windows > 0:
            self._cover(phi_IN, weight_IN, budget_I, subset, grid)
        subset.add_farthest(budget_I - subset.selected_IN.sum(dim=1), weight_IN)

    def _proximity(self, subject_IRC: Tensor) -> Tensor:
        """Largest φ' of a subject after a Gaussian fall-off with distance, [I, rows, columns]. The
        Gaussian is a product of one along rows and one along columns, computed one after the
        other."""
        _, rows, columns = subject_IRC.shape
        reach = self.sigma * max(rows, columns)
        row_R = torch.arange(rows, device=subject_IRC.device)
        column_C = torch.arange(columns, device=subject_IRC.device)
        fade_RR = torch.exp(-(row_R[:, None] - row_R).square() / (2 * reach**2))
        fade_CC = torch.exp(-(column_C[:, None] - column_C).square() / (2 * reach**2))
        along_IRC = (subject_IRC[:, :, None] * fade_CC).amax(dim=3)
        return (along_IRC[:, None] * fade_RR[:, :, None]).amax(dim=2)

    def _cover(
        self,
        phi_IN: Tensor,
        weight_IN: Tensor,
        budget_I: Tensor,
        subset: GreedySubset,
        grid: tuple[int, int],
    ) -> None:
        """Selects the best token of each window without a selected one, in order of mean φ'; at
        most a quarter of the remaining budget."""
        side, (rows, columns) = self.windows, grid
        row_R = torch.arange(rows, device=phi_IN.device) * side // rows
        column_C = torch.arange(columns, device=phi_IN.device) * side // columns
        window_N = (row_R[:, None] * side + column_C).flatten()
        inside_WN = window_N == torch.arange(side**2, device=phi_IN.device)[:, None]
        size_W = inside_WN.sum(dim=1)
        mean_IW = torch.stack([(phi_N * inside_WN).sum(dim=1) / size_W for phi_N in phi_IN])
        covered_IW = (subset.selected_IN[:, None] & inside_WN).any(dim=2)
        open_IW = ~covered_IW & (size_W > 0)
        order_IW = mean_IW.masked_fill(~open_IW, NEVER).argsort(dim=1, descending=True, stable=True)
        remaining_I = budget_I - subset.selected_IN.sum(dim=1)
        visits_I = torch.minimum(open_IW.sum(dim=1), remaining_I // 4)
        for step in range(int(visits_I.max())):
            score_IN = (1 - subset.nearest_IN) * weight_IN
            inside_IN = inside_WN[order_IW[:, step]]
            subset.add_best(score_IN.masked_fill(~inside_IN, NEVER), step < visits_I)

    def _aggregate(
        self,
        image: VisualTokens,
        phi_N: Tensor,
        cosine_NN: Tensor,
        index_K: Tensor,
        context_C: Tensor,
    ) -> Tensor:
        """Features [K, D] of the kept tokens, with the most similar dropped tokens merged into the
        context. Aggregation reaches twice as far as proximity."""
        features_ND = image.features_ND
        dropped_M = complement(index_K, len(phi_N))
        merges = min(int(self.kappa * len(context_C)), len(dropped_M))
        if merges == 0:
            return features_ND[index_K]
        coords_N2 = image.coords_N2.float()
        distance_MC = (coords_N2[dropped_M, None] - coords_N2[context_C]).square().sum(dim=-1)
        reach = 2 * self.sigma * max(image.grid)
        nearness_MC = torch.exp(-distance_MC / (2 * reach**2))
        similarity_MC = cosine_NN[dropped_M[:, None], context_C] * nearness_MC
        best_M = most_similar(similarity_MC, merges)
        merged_CD, received_C1 = merge_tokens(
            features_ND, phi_N, context_C, dropped_M[best_M], similarity_MC[best_M]
        )
        before_CD = features_ND[context_C].float()
        if self.restore_norm:
            merged_CD = normalize(merged_CD, dim=-1) * before_CD.norm(dim=-1, keepdim=True)
        merged_ND = features_ND.clone()
        merged_ND[context_C] = torch.where(received_C1, merged_CD, before_CD).to(merged_ND.dtype)
        return merged_ND[index_K]

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs and, for coherence, those of the eight neighbours, with encoder
        states counted at the features' width."""
        return cosine_flops(tokens, width) + (8 * tokens * width if self.mu else 0)


def _chance_spread(features_ND: Tensor) -> Tensor:
    """Expected standard deviation, over the tokens, of the cosine with a random direction."""
    mean_D = normalize(features_ND.float(), dim=-1).mean(dim=0)
    return ((1 - mean_D.square().sum()).clamp(min=0) / len(mean_D)).sqrt()


def _neighbourhood(phi_RC: Tensor, states_RCV: Tensor) -> Tensor:
    """Mean of φ over the eight neighbours, weighted by their positive cosines, [rows, columns]."""
    unit_RCV = normalize(states_RCV.float(), dim=-1)
    rows, columns = phi_RC.shape
    total_RC, weight_RC = torch.zeros_like(phi_RC), torch.zeros_like(phi_RC)
    for down, right in _BESIDE:
        left = max(0, -right)
        here = slice(0, rows - down), slice(left, columns - max(0, right))
        there = slice(down, rows), slice(left + right, columns + min(0, right))
        cosine = (unit_RCV[here] * unit_RCV[there]).sum(dim=-1).clamp(min=0)
        for one, other in ((here, there), (there, here)):
            total_RC[one] += cosine * phi_RC[other]
            weight_RC[one] += cosine
    return total_RC / weight_RC.clamp(min=1e-12)
