"""SPpruner-R: focus on the subjects, then restore their context.

SPpruner is arXiv 2605.20950 ("Focus-then-Context: Subject-Centric Progressive Visual Token
Reduction for Vision-Language Models"). Only its abstract is public to us: two modules in sequence,
a focus identification that models the interplay of visual saliency and semantic relevance, and a
context-aware structural scan that gathers cues from neighbouring regions. Everything below that
sentence is our reconstruction, hence the R: the algebra, the constants and the merging are ours.

    s, r          saliency and relevance of each token, min-max scaled to [0, 1] per image
    agreement     a = (s^β r^α)^(1/(α+β))           both must agree
    spectrum      o = 1 − (1 − s)(1 − η r)          either makes it a subject
    interplay     φ = λ a + (1 − λ) o
    coherence     φ' = (1 − μ) φ + μ · cosine-weighted mean of φ over the 8 neighbours
    focus F       greedy by φ' with a soft penalty on tokens like those already taken, until F
                  holds ρ of the energy Σφ'², between focus_min and focus_max of the budget
    context C     greedy by novelty · (ε + proximity)^ω, after one pass over empty windows
    aggregation   the most similar dropped tokens are averaged into C, norms restored

With λ=1, μ=0, ω=0, windows=0, redundancy=1 it is FSR's scheme; with focus 0 it is DivPrune's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sppruner.errors import SpecError
from sppruner.relevance import Pool, Source
from sppruner.selectors.base import (
    Selector,
    cls_saliency_IN,
    feature_saliency_IN,
    from_mask,
    min_max_IN,
)
from sppruner.signals import CLS_ATTENTION
from sppruner.types import Selection, VisualTokens

_NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class SPprunerSelector(Selector):
    """Options, with the symbol of the module's docstring where there is one.

    saliency: "cls" or "feature". relevance: "embed", "clip" or "none"; relevance_pool: "mean",
    "max" or "top3". relevance_floor: below this spread (standard deviation of a cosine) the text
    says nothing about this image and saliency decides alone. percentile: saliency is clipped there,
    since CLIP has a few outliers that squash all other values. sigma: reach of a subject, as a share
    of the longer grid side. windows: the grid is split in windows × windows for the coverage pass.
    kappa: dropped tokens merged per context token.
    """

    name: ClassVar[str] = "sppruner"
    saliency: str = "cls"
    relevance: str = "embed"
    relevance_pool: str = "mean"
    relevance_floor: float = 0.02
    percentile: float = 0.99
    alpha: float = 1.0
    beta: float = 1.0
    eta: float = 1.0
    lam: float = 0.5
    mu: float = 0.3
    rho: float = 0.8
    focus_min: float = 0.35
    focus_max: float = 0.65
    redundancy: float = 0.9
    windows: int = 4
    sigma: float = 0.1
    proximity_floor: float = 0.1
    omega: float = 0.5
    kappa: float = 1.0
    restore_norm: bool = True

    def __post_init__(self) -> None:
        choices = {
            "saliency": ("cls", "feature"),
            "relevance": ("embed", "clip", "none"),
            "relevance_pool": ("mean", "max", "top3"),
        }
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise SpecError(f"{option}={getattr(self, option)!r}: use one of {allowed}")
        if not 0 <= self.focus_min <= self.focus_max <= 1:
            raise SpecError("focus_min and focus_max are shares with focus_min <= focus_max")

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({CLS_ATTENTION} if self.saliency == "cls" else ())

    @property
    def relevance_source(self) -> Source:
        return cast(Source, self.relevance)

    @property
    def relevance_join(self) -> Pool:
        return cast(Pool, self.relevance_pool)

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        features_IND = torch.stack([image.features_ND for image in images]).float()
        unit_IND = normalize(features_IND, dim=-1)
        # Cells, not tokens: images of one size may still have grids of different shape.
        coords_IN2 = torch.stack([image.coords_N2 for image in images]).float()
        grid_I2 = coords_IN2.amax(dim=1) + 1
        budget_I = torch.tensor(counts, device=features_IND.device)

        phi_IN = self._interplay(images, coords_IN2)
        focus_IN, nearest_IN = self._focus(phi_IN, unit_IND, budget_I)
        context_IN = self._context(
            phi_IN, unit_IND, coords_IN2, grid_I2, focus_IN, nearest_IN, budget_I
        )
        merged_IND = self._aggregate(phi_IN, features_IND, unit_IND, coords_IN2, grid_I2,
                                     focus_IN, context_IN)  # fmt: skip
        selections = []
        for i, image in enumerate(images):
            index_K = from_mask(focus_IN[i] | context_IN[i])
            selections.append(
                Selection(
                    index_K=index_K,
                    replace_KD=merged_IND[i, index_K].to(image.features_ND.dtype),
                    focus_K=focus_IN[i, index_K],
                )
            )
        return selections

    def _interplay(self, images: Sequence[VisualTokens], coords_IN2: Tensor) -> Tensor:
        """φ' of every token, [I, N]."""
        raw_IN = cls_saliency_IN(images) if self.saliency == "cls" else feature_saliency_IN(images)
        ceiling_I1 = raw_IN.quantile(self.percentile, dim=1, keepdim=True)
        salient_IN = min_max_IN(raw_IN.minimum(ceiling_I1))

        blank_N = torch.zeros_like(raw_IN[0])
        known = [blank_N if im.relevance_N is None else im.relevance_N.float() for im in images]
        text_IN = torch.stack(known)
        informative_I1 = text_IN.std(dim=1, keepdim=True) >= self.relevance_floor
        relevant_IN = min_max_IN(text_IN) * informative_I1
        lam_I1 = self.lam * informative_I1

        both_IN = (salient_IN**self.beta * relevant_IN**self.alpha) ** (
            1 / (self.alpha + self.beta)
        )
        either_IN = 1 - (1 - salient_IN) * (1 - self.eta * relevant_IN)
        phi_IN = lam_I1 * both_IN + (1 - lam_I1) * either_IN
        if self.mu == 0:
            return phi_IN

        states = [im.features_ND if im.hidden_NV is None else im.hidden_NV for im in images]
        unit_INV = normalize(torch.stack(states).float(), dim=-1)
        apart_INN = (coords_IN2[:, :, None] - coords_IN2[:, None]).abs().amax(dim=-1)
        weight_INN = (unit_INV @ unit_INV.transpose(1, 2)).clamp(min=0) * (apart_INN == 1)
        spread_IN = (weight_INN @ phi_IN[:, :, None])[:, :, 0]
        mean_IN = spread_IN / weight_INN.sum(dim=2).clamp(min=1e-12)
        return (1 - self.mu) * phi_IN + self.mu * mean_IN

    def _focus(self, phi_IN: Tensor, unit_IND: Tensor, budget_I: Tensor) -> tuple[Tensor, Tensor]:
        """The subjects [I, N] bool, and every token's largest cosine to one of them [I, N]."""
        energy_IN = phi_IN.square().sort(dim=1, descending=True).values.cumsum(dim=1)
        enough_I = (energy_IN < self.rho * energy_IN[:, -1:]).sum(dim=1) + 1
        low_I = (self.focus_min * budget_I).round().long()
        high_I = (self.focus_max * budget_I).round().long()
        wanted_I = enough_I.clamp(min=low_I, max=high_I)

        taken_IN = torch.zeros_like(phi_IN, dtype=torch.bool)
        nearest_IN = torch.full_like(phi_IN, -1.0)
        slack = max(1 - self.redundancy, 1e-6)
        for step in range(int(wanted_I.max())):
            penalty_IN = ((nearest_IN - self.redundancy) / slack).clamp(0, 1)
            score_IN = (phi_IN * (1 - penalty_IN)).masked_fill(taken_IN, _NEVER)
            _take(score_IN, step < wanted_I, unit_IND, taken_IN, nearest_IN)
        return taken_IN, nearest_IN

    def _context(
        self,
        phi_IN: Tensor,
        unit_IND: Tensor,
        coords_IN2: Tensor,
        grid_I2: Tensor,
        focus_IN: Tensor,
        nearest_IN: Tensor,
        budget_I: Tensor,
    ) -> Tensor:
        """The context [I, N] bool: what is unlike everything kept so far, near a subject first."""
        reach_I = self.sigma * grid_I2.amax(dim=1)
        squared_INN = torch.cdist(coords_IN2, coords_IN2).square()
        near_INN = torch.exp(-squared_INN / (2 * reach_I**2)[:, None, None])
        proximity_IN = (near_INN * (phi_IN * focus_IN)[:, None, :]).amax(dim=2)
        weight_IN = (self.proximity_floor + proximity_IN) ** self.omega

        taken_IN, nearest_IN = focus_IN.clone(), nearest_IN.clone()
        wanted_I = budget_I - focus_IN.sum(dim=1)

        # Coverage: windows without a subject, most salient first, give their best token.
        if self.windows > 0:
            cell_IN2 = (coords_IN2 * self.windows / grid_I2[:, None]).long()
            window_IN = cell_IN2[..., 0] * self.windows + cell_IN2[..., 1]
            zeros_IW = phi_IN.new_zeros(len(phi_IN), self.windows**2)
            size_IW = zeros_IW.scatter_add(1, window_IN, torch.ones_like(phi_IN))
            mean_IW = zeros_IW.scatter_add(1, window_IN, phi_IN) / size_IW.clamp(min=1)
            subjects_IW = zeros_IW.scatter_add(1, window_IN, focus_IN.float())
            open_IW = (subjects_IW == 0) & (size_IW > 0)
            order_IW = mean_IW.masked_fill(~open_IW, _NEVER).argsort(
                dim=1, descending=True, stable=True
            )
            visits_I = torch.minimum(open_IW.sum(dim=1), wanted_I // 4)
            for step in range(int(visits_I.max())):
                inside_IN = window_IN == order_IW[:, step : step + 1]
                score_IN = ((1 - nearest_IN) * weight_IN).masked_fill(taken_IN | ~inside_IN, _NEVER)
                _take(score_IN, step < visits_I, unit_IND, taken_IN, nearest_IN)
            wanted_I = wanted_I - visits_I

        for step in range(int(wanted_I.max())):
            score_IN = ((1 - nearest_IN) * weight_IN).masked_fill(taken_IN, _NEVER)
            _take(score_IN, step < wanted_I, unit_IND, taken_IN, nearest_IN)
        return taken_IN & ~focus_IN

    def _aggregate(
        self,
        phi_IN: Tensor,
        features_IND: Tensor,
        unit_IND: Tensor,
        coords_IN2: Tensor,
        grid_I2: Tensor,
        focus_IN: Tensor,
        context_IN: Tensor,
    ) -> Tensor:
        """Features in which each context token also carries the dropped tokens most like it."""
        if self.kappa == 0:
            return features_IND
        reach_I = 2 * self.sigma * grid_I2.amax(dim=1)
        squared_INN = torch.cdist(coords_IN2, coords_IN2).square()
        alike_INN = (unit_IND @ unit_IND.transpose(1, 2)) * torch.exp(
            -squared_INN / (2 * reach_I**2)[:, None, None]
        )
        value_IN, home_IN = alike_INN.masked_fill(~context_IN[:, None, :], _NEVER).max(dim=2)
        value_IN = value_IN.masked_fill(focus_IN | context_IN, _NEVER)
        rank_IN = value_IN.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        merges_I1 = (self.kappa * context_IN.sum(dim=1, keepdim=True)).long()
        joins_IN = (rank_IN < merges_I1) & value_IN.isfinite()

        weight_IN = phi_IN + 1e-6
        given_IN = weight_IN * joins_IN
        total_IN = weight_IN.scatter_add(1, home_IN, given_IN)
        summed_IND = (weight_IN[:, :, None] * features_IND).scatter_add(
            1, home_IN[:, :, None].expand_as(features_IND), given_IN[:, :, None] * features_IND
        )
        merged_IND = summed_IND / total_IN[:, :, None]
        if self.restore_norm:
            merged_IND = normalize(merged_IND, dim=-1) * features_IND.norm(dim=-1, keepdim=True)
        received_IN = (total_IN > weight_IN)[:, :, None]
        return torch.where(received_IN, merged_IND, features_IND)

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """Cosine rows of the greedy passes, diffusion and merge similarities (2 · N² · D each at
        most; here they are computed as full matrices)."""
        greedy = 2 * kept * tokens * width
        dense = 2 * tokens * tokens * width
        return greedy + (dense if self.mu else 0) + (dense if self.kappa else 0)


def _take(
    score_IN: Tensor, active_I: Tensor, unit_IND: Tensor, taken_IN: Tensor, nearest_IN: Tensor
) -> None:
    """Adds the best-scored token of every active image to `taken_IN` and updates, in place, each
    token's largest cosine to a taken one. No value leaves the device."""
    best_I1 = score_IN.argmax(dim=1, keepdim=True)
    active_I1 = active_I[:, None]
    taken_IN.scatter_(1, best_I1, taken_IN.gather(1, best_I1) | active_I1)
    width = unit_IND.shape[2]
    chosen_I1D = unit_IND.gather(1, best_I1[:, :, None].expand(-1, -1, width))
    cosine_IN = (unit_IND @ chosen_I1D.transpose(1, 2))[:, :, 0]
    nearest_IN.copy_(torch.where(active_I1, torch.maximum(nearest_IN, cosine_IN), nearest_IN))
