"""SPpruner-R's focus: the tokens of subjects, by saliency and relevance to the question.

    s, r          saliency and relevance of each token, min-max scaled to [0, 1] per image
    agreement     a = (s^β r^α)^(1/(α+β))           both are high; without `root`, s^β r^α
    spectrum      o = 1 − (1 − s)(1 − η r)          either is high
    interplay     φ = λ a + (1 − λ) o
    coherence     φ' = (1 − μ) φ + μ · cosine-weighted mean of φ over the 8 neighbours
    focus F       greedy by φ' with a soft penalty on tokens similar to selected ones, until F holds
                  ρ of the energy Σφ'^energy, between focus_min and focus_max of the budget

An instruction may not name anything in the image ("Describe the image."), and its relevance then
hardly differs between tokens. The scale of relevance depends on the model, so its spread is
measured in units of chance: the cosine with a random direction of the D features has the standard
deviation sqrt((1 − |mean unit feature|²) / D) over the tokens, and the mean of T such cosines 1/√T
of it. Text is used if the standard deviation of its relevance exceeds relevance_floor times the
former; the default, a quarter, is the chance spread of 16 unrelated words. On the embedded LLaVA
that instruction spreads 0.17 of chance (0.14 – 0.23, 50 scenes), and kinds of questions 0.39 to
1.03 on average. On the embedded Qwen model it spreads 0.42 (0.32 – 0.53), as much as kinds of
questions that name little: its text is used there.

Source: see `sppruner.selectors.sppruner`.

Shapes: I planes that are selected together, N tokens of each plane, D width of the features, V
width of the encoder states. In grids R is rows and C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sppruner.errors import SpecError
from sppruner.selectors.options import RelevanceOptions, SaliencyOption, check_range, relevance_IN
from sppruner.selectors.saliency import min_max_IN, saliency_IN
from sppruner.selectors.similarity import GreedySubset, encoder_states
from sppruner.types import VisualTokens

# Each pair of neighbours once: right, down, and both diagonals down.
_BESIDE = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True, kw_only=True)
class FocusOptions(SaliencyOption, RelevanceOptions):
    """The options of the focus, and the steps that they govern."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("percentile", "eta", "lam", "mu", "rho", "focus_min", "focus_max"), 0, 1)
        check_range(self, ("relevance_floor", "alpha", "beta", "energy"), 0, float("inf"))
        check_range(self, ("redundancy",), -1, 1)
        if self.focus_min > self.focus_max:
            raise SpecError("focus_min and focus_max are shares with focus_min <= focus_max")
        if self.alpha + self.beta == 0:
            raise SpecError("alpha and beta are both 0: set one of them above 0")

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
