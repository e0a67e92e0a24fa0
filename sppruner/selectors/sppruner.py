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

With λ=1, μ=0, ω=0, windows=0, redundancy=1 it is FSR's scheme; with focus 0 it is farthest-point
sampling as in DivPrune. An image without focus starts its context at the token of largest φ'.
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
    SALIENCY,
    Selector,
    from_mask,
    min_max_IN,
    saliency_IN,
)
from sppruner.types import Selection, VisualTokens

_NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class SPprunerSelector(Selector):
    """Options, with the symbol of the module's docstring where there is one.

    saliency: one of `sppruner.selectors.base.SALIENCY`. relevance: "embed", "clip" or "none";
    relevance_pool: "mean", "max" or "top3". relevance_floor: below this spread (standard deviation
    of a cosine) the text says nothing about this image and saliency decides alone. percentile:
    saliency is clipped there, since CLIP has a few outliers that squash all other values. sigma:
    reach of a subject, as a share of the longer grid side. windows: the grid is split in windows ×
    windows for the coverage pass. kappa: dropped tokens merged per context token.
    """

    name: ClassVar[str] = "sppruner"
    saliency: str = "attention"
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
            "saliency": tuple(SALIENCY),
            "relevance": ("embed", "clip", "none"),
            "relevance_pool": ("mean", "max", "top3"),
        }
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise SpecError(f"{option}={getattr(self, option)!r}: use one of {allowed}")
        for option in ("percentile", "eta", "lam", "mu", "rho", "focus_min", "focus_max"):
            if not 0 <= getattr(self, option) <= 1:
                raise SpecError(f"{option}={getattr(self, option)!r} is outside [0, 1]")
        for option in ("alpha", "beta", "windows", "proximity_floor", "omega", "kappa"):
            if getattr(self, option) < 0:
                raise SpecError(f"{option}={getattr(self, option)!r} is negative")
        if self.focus_min > self.focus_max:
            raise SpecError("focus_min and focus_max are shares with focus_min <= focus_max")
        if self.alpha + self.beta == 0:
            raise SpecError("alpha and beta are both 0: one of them must count")
        if not -1 <= self.redundancy <= 1:
            raise SpecError(f"redundancy={self.redundancy!r} is a cosine: use -1 to 1 (1 is off)")
        if self.sigma <= 0:
            raise SpecError(f"sigma={self.sigma!r} is a reach: use a share above 0")

    @property
    def signals(self) -> frozenset[str]:
        return SALIENCY[self.saliency]

    @property
    def relevance_source(self) -> Source:
        return cast(Source, self.relevance)

    @property
    def relevance_join(self) -> Pool:
        return cast(Pool, self.relevance_pool)

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        # Cells, not tokens: images of one size may still have grids of different shape.
        coords_IN2 = torch.stack([image.coords_N2 for image in images]).float()
        grid_I2 = coords_IN2.amax(dim=1) + 1
        squared_INN = _squared_distance(images)
        unit_IND = torch.stack([normalize(im.features_ND.float(), dim=-1) for im in images])
        cosine_INN = unit_IND @ unit_IND.transpose(1, 2)
        budget_I = torch.tensor(counts, device=unit_IND.device)

        phi_IN = self._interplay(images, squared_INN)
        focus_IN, nearest_IN = self._focus(phi_IN, cosine_INN, budget_I)
        reach_I11 = (self.sigma * grid_I2.amax(dim=1))[:, None, None]
        near_INN = torch.exp(-squared_INN / (2 * reach_I11**2))
        proximity_IN = (near_INN * (phi_IN * focus_IN)[:, None, :]).amax(dim=2)
        context_IN = self._context(
            phi_IN, cosine_INN, proximity_IN, coords_IN2, grid_I2, focus_IN, nearest_IN, budget_I
        )
        selections = []
        for i, image in enumerate(images):
            index_K = from_mask(focus_IN[i] | context_IN[i])
            replaced_KD = None
            if self.kappa > 0:
                # Aggregation reaches twice as far as proximity: the fourth root doubles σ.
                alike_NN = cosine_INN[i] * near_INN[i % len(near_INN)] ** 0.25
                replaced_KD = self._aggregate(
                    phi_IN[i], image.features_ND, alike_NN, index_K, context_IN[i]
                )
            selections.append(
                Selection(index_K=index_K, replace_KD=replaced_KD, focus_K=focus_IN[i, index_K])
            )
        return selections

    def _interplay(self, images: Sequence[VisualTokens], squared_INN: Tensor) -> Tensor:
        """φ' of every token, [I, N]."""
        raw_IN = saliency_IN(images, self.saliency)
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
        # Squared distances 1 and 2: the eight neighbours.
        beside_INN = (squared_INN > 0) & (squared_INN <= 2)
        weight_INN = (unit_INV @ unit_INV.transpose(1, 2)).clamp_(min=0).mul_(beside_INN)
        spread_IN = (weight_INN @ phi_IN[:, :, None])[:, :, 0]
        mean_IN = spread_IN / weight_INN.sum(dim=2).clamp(min=1e-12)
        return (1 - self.mu) * phi_IN + self.mu * mean_IN

    def _focus(self, phi_IN: Tensor, cosine_INN: Tensor, budget_I: Tensor) -> tuple[Tensor, Tensor]:
        """The subjects [I, N] bool, and every token's largest cosine to one of them [I, N]."""
        energy_IN = phi_IN.square().sort(dim=1, descending=True).values.cumsum(dim=1)
        enough_I = (energy_IN < self.rho * energy_IN[:, -1:]).sum(dim=1) + 1
        low_I = (self.focus_min * budget_I).round().long()
        high_I = (self.focus_max * budget_I).round().long()
        wanted_I = enough_I.clamp(min=low_I, max=high_I)

        taken_IN = torch.zeros_like(phi_IN, dtype=torch.bool)
        nearest_IN = torch.full_like(phi_IN, -1.0)
        slack = 1 - self.redundancy
        for step in range(int(wanted_I.max())):
            score_IN = phi_IN
            if slack > 0:
                score_IN = phi_IN * (1 - ((nearest_IN - self.redundancy) / slack).clamp(0, 1))
            score_IN = score_IN.masked_fill(taken_IN, _NEVER)
            _take(score_IN, step < wanted_I, cosine_INN, taken_IN, nearest_IN)
        return taken_IN, nearest_IN

    def _context(
        self,
        phi_IN: Tensor,
        cosine_INN: Tensor,
        proximity_IN: Tensor,
        coords_IN2: Tensor,
        grid_I2: Tensor,
        focus_IN: Tensor,
        nearest_IN: Tensor,
        budget_I: Tensor,
    ) -> Tensor:
        """The context [I, N] bool: what is unlike everything kept so far, near a subject first."""
        weight_IN = (self.proximity_floor + proximity_IN) ** self.omega
        taken_IN, nearest_IN = focus_IN.clone(), nearest_IN.clone()
        wanted_I = budget_I - focus_IN.sum(dim=1)

        # Without a subject every token is equally new; the most salient one is then the seed.
        seeded_I = ~focus_IN.any(dim=1)
        _take(phi_IN, seeded_I, cosine_INN, taken_IN, nearest_IN)
        wanted_I = wanted_I - seeded_I.long()

        # Coverage: windows without a kept token, most salient first, give their best token.
        if self.windows > 0:
            cell_IN2 = (coords_IN2 * self.windows / grid_I2[:, None]).long()
            window_IN = cell_IN2[..., 0] * self.windows + cell_IN2[..., 1]
            zeros_IW = phi_IN.new_zeros(len(phi_IN), self.windows**2)
            size_IW = zeros_IW.scatter_add(1, window_IN, torch.ones_like(phi_IN))
            mean_IW = zeros_IW.scatter_add(1, window_IN, phi_IN) / size_IW.clamp(min=1)
            kept_IW = zeros_IW.scatter_add(1, window_IN, taken_IN.float())
            open_IW = (kept_IW == 0) & (size_IW > 0)
            order_IW = mean_IW.masked_fill(~open_IW, _NEVER).argsort(
                dim=1, descending=True, stable=True
            )
            visits_I = torch.minimum(open_IW.sum(dim=1), wanted_I // 4)
            for step in range(int(visits_I.max())):
                inside_IN = window_IN == order_IW[:, step : step + 1]
                score_IN = ((1 - nearest_IN) * weight_IN).masked_fill(taken_IN | ~inside_IN, _NEVER)
                _take(score_IN, step < visits_I, cosine_INN, taken_IN, nearest_IN)
            wanted_I = wanted_I - visits_I

        for step in range(int(wanted_I.max())):
            score_IN = ((1 - nearest_IN) * weight_IN).masked_fill(taken_IN, _NEVER)
            _take(score_IN, step < wanted_I, cosine_INN, taken_IN, nearest_IN)
        return taken_IN & ~focus_IN

    def _aggregate(
        self,
        phi_N: Tensor,
        features_ND: Tensor,
        alike_NN: Tensor,
        index_K: Tensor,
        context_N: Tensor,
    ) -> Tensor:
        """Features [K, D] of the kept tokens of one image, in which each context token also carries
        the dropped tokens most like it. One product instead of scattered additions: the same sum
        in the same order on every device."""
        kept_KD = features_ND[index_K]
        among_C = context_N[index_K].nonzero().squeeze(1)
        dropped_N = torch.ones_like(context_N)
        dropped_N[index_K] = False
        dropped_M = from_mask(dropped_N)
        merges = min(int(self.kappa * len(among_C)), len(dropped_M))
        if merges == 0:
            return kept_KD
        context_C = index_K[among_C]
        value_M, home_M = alike_NN[dropped_M][:, context_C].max(dim=1)
        best_M = value_M.argsort(descending=True, stable=True)[:merges]
        joins_M, home_M = dropped_M[best_M], home_M[best_M]

        weight_N = phi_N + 1e-6
        share_CM = weight_N[joins_M] * (
            torch.arange(len(among_C), device=home_M.device)[:, None] == home_M
        )
        own_C1 = weight_N[context_C, None]
        before_CD = features_ND[context_C].float()
        summed_CD = own_C1 * before_CD + share_CM @ features_ND[joins_M].float()
        merged_CD = summed_CD / (own_C1 + share_CM.sum(dim=1, keepdim=True))
        if self.restore_norm:
            merged_CD = normalize(merged_CD, dim=-1) * before_CD.norm(dim=-1, keepdim=True)
        received_C1 = (share_CM > 0).any(dim=1, keepdim=True)
        merged_KD = kept_KD.clone()
        merged_KD[among_C] = torch.where(received_C1, merged_CD, before_CD).to(kept_KD.dtype)
        return merged_KD

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs, once; with diffusion twice, counting the encoder's states as if
        they had the features' width."""
        return (2 if self.mu else 1) * 2 * tokens * tokens * width


def _squared_distance(images: Sequence[VisualTokens]) -> Tensor:
    """Squared grid distances [I, N, N]; [1, N, N] where all images share one grid."""
    first_N2 = images[0].coords_N2
    shared = all(im.coords_N2 is first_N2 or im.coords_N2.equal(first_N2) for im in images[1:])
    grids = [first_N2] if shared else [image.coords_N2 for image in images]
    coords_GN2 = torch.stack(grids).float()
    return (coords_GN2[:, :, None] - coords_GN2[:, None]).square().sum(dim=-1)


def _take(
    score_IN: Tensor, active_I: Tensor, cosine_INN: Tensor, taken_IN: Tensor, nearest_IN: Tensor
) -> None:
    """Adds the best-scored token of every active image to `taken_IN` and updates, in place, each
    token's largest cosine to a taken one. No value leaves the device."""
    best_I1 = score_IN.argmax(dim=1, keepdim=True)
    active_I1 = active_I[:, None]
    taken_IN.scatter_(1, best_I1, taken_IN.gather(1, best_I1) | active_I1)
    row_I1N = best_I1[:, :, None].expand(-1, -1, cosine_INN.shape[2])
    cosine_IN = cosine_INN.gather(1, row_I1N)[:, 0]
    nearest_IN.copy_(torch.where(active_I1, torch.maximum(nearest_IN, cosine_IN), nearest_IN))
