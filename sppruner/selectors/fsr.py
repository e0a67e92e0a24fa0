"""FSR: focus on what is salient and asked for, scan for the rest, refine it (arXiv 2602.05809).

    s, r        saliency (eq 1) and relevance (eq 2), min-max scaled to [0, 1] per image
    φ = r^α s^β                                                                   eq 3
    focus F     the top K_F by φ; K_F is the smallest count that holds ρ of Σφ    eq 4
    scan S      K − K_F times the token of largest distance to its nearest kept
                one, in cosines of projected features                             eq 5
    refine      each dropped token's home is the token of S most like it; the κ|S|
                most alike are averaged into their homes, weighted by φ           eqs 8, 9

Known from the paper: all of the above with α 3, β 1, ρ 0.9, κ 1. No code was published. Ours: K_F
leaves at least a tenth of the budget, and one token, to the scan, since eq 4 alone may exceed the
budget and then only the top of φ would be kept, and it leaves at least one token to the focus,
from which the scan starts; where the weights φ of a home and of all it receives are 0, which eq 9
leaves undefined, their plain mean; where the text is missing or tells no token from another,
φ = s^β, as the paper's own runs on Qwen2.5-VL have it; relevance defaults to the language model's
word embeddings, since LLaVA checkpoints lack the text tower of CLIP that eq 2 takes. The sign of
"clip" relevance, on which paper and related code differ, is `ClipText`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sppruner.selectors.base import from_mask, min_max_IN, saliency_IN
from sppruner.selectors.options import RelevanceOptions, SaliencyOption, relevance_IN, within
from sppruner.selectors.similarity import Picks, absorb, closest, cosine_flops, cosines_INN
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FSRSelector(SaliencyOption, RelevanceOptions):
    """Options carry the symbols of the module's docstring."""

    name: ClassVar[str] = "fsr"
    alpha: float = 3.0
    beta: float = 1.0
    rho: float = 0.9
    kappa: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, ("alpha", "beta", "kappa"), 0, float("inf"))
        within(self, ("rho",), 0, 1)

    def _select(self, images: Sequence[VisualTokens], counts: Sequence[int]) -> list[Selection]:
        phi_IN = self._importance(images)
        focus_IN = self._focus(phi_IN, counts)
        cosine_INN = cosines_INN([image.features_ND for image in images])
        picks = Picks(cosine_INN)
        picks.take_all(focus_IN)
        budget_I = torch.tensor(counts, device=phi_IN.device)
        picks.scan(budget_I - focus_IN.sum(dim=1))
        selections = []
        for i, image in enumerate(images):
            index_K = from_mask(picks.taken_IN[i])
            scan_S = from_mask(picks.taken_IN[i] & ~focus_IN[i])
            replaced_KD = self._refine(image.features_ND, phi_IN[i], cosine_INN[i], index_K, scan_S)
            selections.append(
                Selection(index_K=index_K, replace_KD=replaced_KD, focus_K=focus_IN[i, index_K])
            )
        return selections

    def _importance(self, images: Sequence[VisualTokens]) -> Tensor:
        """φ of every token, [I, N]."""
        salient_IN = min_max_IN(saliency_IN(images, self.saliency))
        relevant_IN = min_max_IN(relevance_IN(images))
        # All zeros after scaling: no text, or one that tells no token from another.
        asked_I1 = relevant_IN.any(dim=1, keepdim=True)
        return salient_IN**self.beta * torch.where(asked_I1, relevant_IN**self.alpha, 1.0)

    def _focus(self, phi_IN: Tensor, counts: Sequence[int]) -> Tensor:
        """The focus [I, N] bool."""
        order_IN = phi_IN.argsort(dim=1, descending=True, stable=True)
        mass_IN = phi_IN.gather(1, order_IN).cumsum(dim=1)
        enough_I = (mass_IN < self.rho * mass_IN[:, -1:]).sum(dim=1) + 1
        most_I = torch.tensor([max(1, k - max(1, -(-k // 10))) for k in counts])
        size_I = enough_I.minimum(most_I.to(enough_I.device))
        place_N = torch.arange(phi_IN.shape[1], device=phi_IN.device)
        first_IN = place_N < size_I[:, None]
        return torch.zeros_like(first_IN).scatter(1, order_IN, first_IN)

    def _refine(
        self,
        features_ND: Tensor,
        phi_N: Tensor,
        cosine_NN: Tensor,
        index_K: Tensor,
        scan_S: Tensor,
    ) -> Tensor | None:
        """Features [K, D] of the kept tokens, those of the scan refined; None if none are."""
        dropped_N = torch.ones_like(phi_N, dtype=torch.bool)
        dropped_N[index_K] = False
        dropped_M = from_mask(dropped_N)
        merges = min(int(self.kappa * len(scan_S)), len(dropped_M))
        if merges == 0:
            return None
        alike_MS = cosine_NN[dropped_M[:, None], scan_S]
        best_M = closest(alike_MS, merges)
        refined_SD, received_S1 = absorb(
            features_ND, phi_N, scan_S, dropped_M[best_M], alike_MS[best_M]
        )
        refined_ND = features_ND.clone()
        refined_ND[scan_S] = torch.where(
            received_S1, refined_SD.to(features_ND.dtype), features_ND[scan_S]
        )
        return refined_ND[index_K]

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs."""
        return cosine_flops(tokens, width)
