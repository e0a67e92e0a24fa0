"""SPpruner-R's context: tokens that restore what the focus leaves out, and merging into them.

    context C     greedy by novelty · (ε + proximity)^ω, after one pass over empty windows
    aggregation   the most similar dropped tokens are averaged into C, norms restored

Source: see `sppruner.selectors.sppruner`.

Shapes: I planes that are selected together, N tokens of each plane, D width of the features, K
kept, C context and M dropped tokens, W windows. In grids R is rows and C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sppruner.errors import SpecError
from sppruner.selectors.base import Selector
from sppruner.selectors.options import check_range
from sppruner.selectors.similarity import (
    NEVER,
    GreedySubset,
    complement,
    merge_tokens,
    most_similar,
)
from sppruner.types import VisualTokens

_LEAST_SIGMA = 1e-6


@dataclass(frozen=True, kw_only=True)
class ContextOptions(Selector):
    """The options of the context, and the steps that they govern."""

    windows: int = 3
    """Windows along each side of the grid in the coverage pass; 0 leaves the pass out."""

    sigma: float = 0.1
    """σ, at least 1e-6: the reach of a subject, as a share of the longer grid side."""

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
        check_range(self, ("windows", "proximity_floor", "omega", "kappa"), 0, float("inf"))
        if not self.sigma >= _LEAST_SIGMA:
            raise SpecError(
                f"sigma={self.sigma!r} is a reach: use a share of at least {_LEAST_SIGMA:g}"
            )

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
        # More windows than rows and columns are windows without tokens.
        side, (rows, columns) = min(self.windows, max(grid)), grid
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
        merges = int(min(self.kappa * len(context_C), len(dropped_M)))
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
