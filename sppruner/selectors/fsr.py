"""FSR: focus on salient and relevant tokens, scan for context, refine it (arXiv 2602.05809).

    s, r        saliency (eq 1) and relevance (eq 2), min-max scaled to [0, 1] per image
    φ = r^α s^β                                                                   eq 3
    focus F     the top K_F by φ; K_F is the smallest count that holds ρ of Σφ    eq 4
    scan S      K − K_F times the token of largest distance to its nearest kept
                one, in cosines of projected features                             eq 5
    refine      each dropped token is assigned to the token of S most similar to
                it; the κ|S| most similar are averaged into theirs, weighted by φ eqs 8, 9

From the paper: all of the above with α 3, β 1, ρ 0.9, κ 1. No code was published. Ours: K_F leaves
at least a tenth of the budget, and one token, to the scan, since eq 4 alone may exceed the budget
and would then keep only the top of φ, and at least one token to the focus, from which the scan
starts; a group whose weights φ are all 0, which eq 9 leaves undefined, gets its plain mean; without
text, or if relevance is the same for all tokens, φ = s^β, as in the paper's runs on Qwen2.5-VL;
relevance defaults to the language model's word embeddings, since LLaVA checkpoints lack CLIP's text
tower, which eq 2 uses. The sign of "clip" relevance, on which paper and related code differ, is
that of `ClipText`.

Shapes: I planes that are selected together, N tokens of each plane, D width of the features, K
kept, M dropped and S scanned tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.selectors.base import mask_to_index
from sppruner.selectors.options import RelevanceOptions, SaliencyOption, check_range, relevance_IN
from sppruner.selectors.saliency import min_max_IN, saliency_IN
from sppruner.selectors.similarity import (
    GreedySubset,
    complement,
    cosine_flops,
    cosines_INN,
    merge_tokens,
    most_similar,
)
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FSRSelector(SaliencyOption, RelevanceOptions):
    """Focus, scan and refine."""

    name: ClassVar[str] = "fsr"

    alpha: float = 3.0
    """α, from 0: the exponent of relevance."""

    beta: float = 1.0
    """β, from 0: the exponent of saliency."""

    rho: float = 0.9
    """ρ, 0 to 1: the share of Σφ that the focus holds."""

    kappa: float = 1.0
    """κ, from 0: dropped tokens that are merged per scanned token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("alpha", "beta", "kappa"), 0, float("inf"))
        check_range(self, ("rho",), 0, 1)

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        phi_IN = self._importance(images)
        focus_IN = self._focus(phi_IN, counts)
        cosine_INN = cosines_INN([image.features_ND for image in images])
        subset = GreedySubset(cosine_INN)
        subset.add_mask(focus_IN)
        budget_I = torch.tensor(counts, device=phi_IN.device)
        subset.add_farthest(budget_I - focus_IN.sum(dim=1))
        selections = []
        for i, image in enumerate(images):
            index_K = mask_to_index(subset.selected_IN[i])
            scan_S = mask_to_index(subset.selected_IN[i] & ~focus_IN[i])
            replaced_KD = self._refine(image.features_ND, phi_IN[i], cosine_INN[i], index_K, scan_S)
            selections.append(
                Selection(index_K=index_K, replace_KD=replaced_KD, focus_K=focus_IN[i, index_K])
            )
        return selections

    def _importance(self, images: Sequence[VisualTokens]) -> Tensor:
        """φ of each token, [I, N]."""
        salient_IN = min_max_IN(saliency_IN(images, self.saliency))
        relevant_IN = min_max_IN(relevance_IN(images))
        # All zeros after scaling: there is no text, or relevance is the same for all tokens.
        has_text_I1 = relevant_IN.any(dim=1, keepdim=True)
        return salient_IN**self.beta * torch.where(has_text_I1, relevant_IN**self.alpha, 1.0)

    def _focus(self, phi_IN: Tensor, counts: Sequence[int]) -> Tensor:
        """The focus [I, N] bool."""
        order_IN = phi_IN.argsort(dim=1, descending=True, stable=True)
        mass_IN = phi_IN.gather(1, order_IN).cumsum(dim=1)
        enough_I = (mass_IN < self.rho * mass_IN[:, -1:]).sum(dim=1) + 1
        most_I = torch.tensor([max(1, k - max(1, -(-k // 10))) for k in counts])
        size_I = enough_I.minimum(most_I.to(enough_I.device))
        rank_N = torch.arange(phi_IN.shape[1], device=phi_IN.device)
        first_IN = rank_N < size_I[:, None]
        return torch.zeros_like(first_IN).scatter(1, order_IN, first_IN)

    def _refine(
        self,
        features_ND: Tensor,
        phi_N: Tensor,
        cosine_NN: Tensor,
        index_K: Tensor,
        scan_S: Tensor,
    ) -> Tensor | None:
        """Features [K, D] of the kept tokens, with those of the scan refined; None if none are."""
        dropped_M = complement(index_K, len(phi_N))
        merges = int(min(self.kappa * len(scan_S), len(dropped_M)))
        if merges == 0:
            return None
        similarity_MS = cosine_NN[dropped_M[:, None], scan_S]
        best_M = most_similar(similarity_MS, merges)
        refined_SD, received_S1 = merge_tokens(
            features_ND, phi_N, scan_S, dropped_M[best_M], similarity_MS[best_M]
        )
        refined_ND = features_ND.clone()
        refined_ND[scan_S] = torch.where(
            received_S1, refined_SD.to(features_ND.dtype), features_ND[scan_S]
        )
        return refined_ND[index_K]

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs."""
        return cosine_flops(tokens, width)
