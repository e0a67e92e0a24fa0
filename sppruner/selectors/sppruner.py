"""SPpruner-R: focus on the subjects, then restore their context.

SPpruner is arXiv 2605.20950 ("Focus-then-Context: Subject-Centric Progressive Visual Token
Reduction for Vision-Language Models"). Only its abstract is public to us: two modules in sequence,
a focus identification that models the interplay of visual saliency and semantic relevance, and a
context-aware structural scan that gathers cues from neighbouring regions. Everything below that
sentence is our reconstruction, hence the R: the algebra, the constants and the merging are ours.

    s, r          saliency and relevance of each token, min-max scaled to [0, 1] per image
    agreement     a = (s^β r^α)^(1/(α+β))           both must agree; without `root`, s^β r^α
    spectrum      o = 1 − (1 − s)(1 − η r)          either makes it a subject
    interplay     φ = λ a + (1 − λ) o
    coherence     φ' = (1 − μ) φ + μ · cosine-weighted mean of φ over the 8 neighbours
    focus F       greedy by φ' with a soft penalty on tokens like those already taken, until F
                  holds ρ of the energy Σφ'^energy, between focus_min and focus_max of the budget
    context C     greedy by novelty · (ε + proximity)^ω, after one pass over empty windows
    aggregation   the most similar dropped tokens are averaged into C, norms restored

An instruction may say nothing about an image ("Describe the image."), and its relevance then hardly
differs between tokens. How much is much depends on the model, so it is measured in units of chance:
the cosine with a random direction of the D features has the standard deviation
sqrt((1 − |mean unit feature|²) / D) over the tokens, the mean of T of them a √T-th of it. Text
counts where its own standard deviation is above relevance_floor times the former; the default, a
quarter, is what 16 unrelated words spread by chance. On the embedded model that request spreads
0.03 of chance, and kinds of questions that name things 0.4 to 1.3 on average.

The constants are those that `jobs/tune.py` chose on the tuning scenes of the embedded LLaVA, at
33.3, 22.2 and 11.1 %: 99.7 % of dense accuracy on 600 questions, where values argued beforehand
(λ=0.5, η=1, μ=0.3, four windows) had 99.3 %. On 3,000 further tuning questions the two could not be
told apart (0.03 to 0.07 points, intervals on both sides of 0): of two sets that this model does not
tell, the cheaper one is kept, which has no coherence to compute. Nor could merging be told from
none; it stays, being the last step of restoring context (kappa=0 turns it off).

Limits: λ=1, μ=0, ω=0, windows=0, redundancy=1, no root, energy 1, percentile 1, an endless σ and no
norms restored is FSR; focus 0, ω=0 and windows=0 is farthest-point sampling, DivPrune with another
seed, since an image without focus starts its context at the token of largest φ'; focus 1 with λ=0,
η=0, μ=0 and redundancy 1 is the top of saliency.
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
from sppruner.selectors.base import from_mask, min_max_IN, saliency_IN
from sppruner.selectors.options import RelevanceOptions, SaliencyOption, relevance_IN, within
from sppruner.selectors.similarity import (
    NEVER,
    Picks,
    absorb,
    closest,
    cosine_flops,
    cosines_INN,
    encoder_states,
)
from sppruner.selectors.staged import check_stages
from sppruner.spec import Budget
from sppruner.stages import TokenSchedule
from sppruner.types import Selection, VisualTokens

# Each pair of neighbours once: right, down, and both diagonals down.
_BESIDE = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True, kw_only=True)
class SPprunerSelector(SaliencyOption, RelevanceOptions):
    """Options, with the symbol of the module's docstring where there is one.

    percentile: saliency is clipped there, since CLIP has a few outliers that squash all other
    values. relevance_floor: see above; 0 always counts the text. sigma: reach of a subject, as a
    share of the longer grid side. windows: the grid is split in windows × windows for the coverage
    pass. kappa: dropped tokens merged per context token. mode: "pre" spends the budget in front of
    the decoder; with "pre+mid" it is the average over the decoder's layers: 1.5 times as many
    tokens enter, and in front of the middle layer the attention that the last prompt token has paid
    in the layer before leaves 0.5 times as many, the split of VScan.
    """

    name: ClassVar[str] = "sppruner"
    mode: str = "pre"
    relevance_floor: float = 0.25
    percentile: float = 0.99
    alpha: float = 1.0
    beta: float = 1.0
    root: bool = True
    eta: float = 0.5
    lam: float = 0.75
    mu: float = 0.0
    rho: float = 0.8
    energy: float = 2.0
    focus_min: float = 0.35
    focus_max: float = 0.65
    redundancy: float = 0.9
    windows: int = 3
    sigma: float = 0.1
    proximity_floor: float = 0.1
    omega: float = 0.5
    kappa: float = 1.0
    restore_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, ("percentile", "eta", "lam", "mu", "rho", "focus_min", "focus_max"), 0, 1)
        free = ("relevance_floor", "alpha", "beta", "windows", "proximity_floor", "omega", "kappa")
        within(self, (*free, "energy"), 0, float("inf"))
        within(self, ("redundancy",), -1, 1)
        if self.focus_min > self.focus_max:
            raise SpecError("focus_min and focus_max are shares with focus_min <= focus_max")
        if self.alpha + self.beta == 0:
            raise SpecError("alpha and beta are both 0: one of them must count")
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

        The average is k to the token: where halves do not come out, or fewer than 1.5 k tokens are
        there, the two are as far apart as whole numbers of that average can be.
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
        """With "pre+mid", how much more than `k` depends on where the decoder's middle is."""
        most = min(n, k + k // 2) if self.staged else k
        return k, most

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        grid = images[0].grid
        phi_IN = self._interplay(images, grid)
        picks = Picks(cosine_INN := cosines_INN([image.features_ND for image in images]))
        budget_I = torch.tensor(counts, device=phi_IN.device)
        self._focus(phi_IN, budget_I, picks)
        focus_IN = picks.taken_IN.clone()
        self._context(phi_IN, budget_I, picks, grid)
        selections = []
        for i, image in enumerate(images):
            index_K = from_mask(picks.taken_IN[i])
            replaced_KD = None
            if self.kappa > 0:
                context_C = from_mask(picks.taken_IN[i] & ~focus_IN[i])
                replaced_KD = self._aggregate(image, phi_IN[i], cosine_INN[i], index_K, context_C)
            selections.append(
                Selection(index_K=index_K, replace_KD=replaced_KD, focus_K=focus_IN[i, index_K])
            )
        return selections

    def _interplay(self, images: Sequence[VisualTokens], grid: tuple[int, int]) -> Tensor:
        """φ' of every token, [I, N]."""
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

    def _focus(self, phi_IN: Tensor, budget_I: Tensor, picks: Picks) -> None:
        """Takes the subjects."""
        energy_IN = (phi_IN**self.energy).sort(dim=1, descending=True).values.cumsum(dim=1)
        enough_I = (energy_IN < self.rho * energy_IN[:, -1:]).sum(dim=1) + 1
        low_I = (self.focus_min * budget_I).round().long()
        high_I = (self.focus_max * budget_I).round().long()
        wanted_I = enough_I.clamp(min=low_I, max=high_I)
        slack = 1 - self.redundancy
        for step in range(int(wanted_I.max())):
            score_IN = phi_IN
            if slack > 0:
                excess_IN = (picks.nearest_IN - self.redundancy) / slack
                score_IN = phi_IN * (1 - excess_IN.clamp(0, 1))
            picks.take(score_IN, step < wanted_I)

    def _context(
        self, phi_IN: Tensor, budget_I: Tensor, picks: Picks, grid: tuple[int, int]
    ) -> None:
        """Takes the context: what is unlike everything kept so far, near a subject first."""
        subject_IN = phi_IN * picks.taken_IN
        proximity_IN = self._proximity(subject_IN.view(-1, *grid)).flatten(1)
        weight_IN = (self.proximity_floor + proximity_IN) ** self.omega
        # Without a subject every token is equally new; the most salient one is then the seed.
        picks.take(phi_IN, ~picks.taken_IN.any(dim=1))
        if self.windows > 0:
            self._cover(phi_IN, weight_IN, budget_I, picks, grid)
        picks.scan(budget_I - picks.taken_IN.sum(dim=1), weight_IN)

    def _proximity(self, subject_IRC: Tensor) -> Tensor:
        """Largest φ' of a subject, faded by its distance, [I, rows, columns]: a Gaussian is a
        product of one along the rows and one along the columns, so each is done by itself."""
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
        picks: Picks,
        grid: tuple[int, int],
    ) -> None:
        """Windows without a kept token, most salient first, give their best token; at most a
        quarter of what is left of the budget is spent so."""
        side, (rows, columns) = self.windows, grid
        row_R = torch.arange(rows, device=phi_IN.device) * side // rows
        column_C = torch.arange(columns, device=phi_IN.device) * side // columns
        window_N = (row_R[:, None] * side + column_C).flatten()
        inside_WN = window_N == torch.arange(side**2, device=phi_IN.device)[:, None]
        size_W = inside_WN.sum(dim=1)
        mean_IW = torch.stack([(phi_N * inside_WN).sum(dim=1) / size_W for phi_N in phi_IN])
        held_IW = (picks.taken_IN[:, None] & inside_WN).any(dim=2)
        open_IW = ~held_IW & (size_W > 0)
        order_IW = mean_IW.masked_fill(~open_IW, NEVER).argsort(dim=1, descending=True, stable=True)
        left_I = budget_I - picks.taken_IN.sum(dim=1)
        visits_I = torch.minimum(open_IW.sum(dim=1), left_I // 4)
        for step in range(int(visits_I.max())):
            score_IN = (1 - picks.nearest_IN) * weight_IN
            inside_IN = inside_WN[order_IW[:, step]]
            picks.take(score_IN.masked_fill(~inside_IN, NEVER), step < visits_I)

    def _aggregate(
        self,
        image: VisualTokens,
        phi_N: Tensor,
        cosine_NN: Tensor,
        index_K: Tensor,
        context_C: Tensor,
    ) -> Tensor:
        """Features [K, D] of the kept tokens, in which each context token also carries the dropped
        tokens most like it. Aggregation reaches twice as far as proximity."""
        features_ND = image.features_ND
        dropped_N = torch.ones_like(phi_N, dtype=torch.bool)
        dropped_N[index_K] = False
        dropped_M = from_mask(dropped_N)
        merges = min(int(self.kappa * len(context_C)), len(dropped_M))
        if merges == 0:
            return features_ND[index_K]
        coords_N2 = image.coords_N2.float()
        apart_MC = (coords_N2[dropped_M, None] - coords_N2[context_C]).square().sum(dim=-1)
        reach = 2 * self.sigma * max(image.grid)
        alike_MC = cosine_NN[dropped_M[:, None], context_C] * torch.exp(-apart_MC / (2 * reach**2))
        best_M = closest(alike_MC, merges)
        merged_CD, received_C1 = absorb(
            features_ND, phi_N, context_C, dropped_M[best_M], alike_MC[best_M]
        )
        before_CD = features_ND[context_C].float()
        if self.restore_norm:
            merged_CD = normalize(merged_CD, dim=-1) * before_CD.norm(dim=-1, keepdim=True)
        merged_ND = features_ND.clone()
        merged_ND[context_C] = torch.where(received_C1, merged_CD, before_CD).to(merged_ND.dtype)
        return merged_ND[index_K]

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs, and for diffusion those of the eight neighbours, counting the
        encoder's states as if they had the features' width."""
        return cosine_flops(tokens, width) + (8 * tokens * width if self.mu else 0)


def _chance_spread(features_ND: Tensor) -> Tensor:
    """Expected standard deviation over the tokens of their cosine with a random direction."""
    mean_D = normalize(features_ND.float(), dim=-1).mean(dim=0)
    return ((1 - mean_D.square().sum()).clamp(min=0) / len(mean_D)).sqrt()


def _neighbourhood(phi_RC: Tensor, states_RCV: Tensor) -> Tensor:
    """Mean of φ over the eight neighbours, weighted by positive cosines, [rows, columns]."""
    unit_RCV = normalize(states_RCV.float(), dim=-1)
    rows, columns = phi_RC.shape
    total_RC, weight_RC = torch.zeros_like(phi_RC), torch.zeros_like(phi_RC)
    for down, right in _BESIDE:
        left = max(0, -right)
        here = slice(0, rows - down), slice(left, columns - max(0, right))
        there = slice(down, rows), slice(left + right, columns + min(0, right))
        likeness = (unit_RCV[here] * unit_RCV[there]).sum(dim=-1).clamp(min=0)
        for one, other in ((here, there), (there, here)):
            total_RC[one] += likeness * phi_RC[other]
            weight_RC[one] += likeness
    return total_RC / weight_RC.clamp(min=1e-12)
