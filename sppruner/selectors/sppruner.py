"""SPpruner-R: focus on the subjects, then restore their context.

SPpruner is arXiv 2605.20950 ("Focus-then-Context: Subject-Centric Progressive Visual Token
Reduction for Vision-Language Models"). Only its abstract is public to us: two modules in sequence,
a focus identification that models the interplay of visual saliency and semantic relevance, and a
context-aware structural scan that gathers cues from neighbouring regions. Everything below that
sentence is our reconstruction, hence the R: the algebra, the constants and the merging are ours.
`sppruner_focus.py` and `sppruner_context.py` have the equations.

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

Shapes: I planes that are selected together, N tokens of each plane, K kept and C context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch

from sppruner.capabilities import Capabilities
from sppruner.selectors.base import mask_to_index
from sppruner.selectors.options import check_choice
from sppruner.selectors.similarity import GreedySubset, cosine_flops, cosines_INN
from sppruner.selectors.sppruner_context import ContextOptions
from sppruner.selectors.sppruner_focus import FocusOptions
from sppruner.selectors.staged import check_stages
from sppruner.spec import Budget
from sppruner.stages import TokenSchedule
from sppruner.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class SPprunerSelector(FocusOptions, ContextOptions):
    """Focus, context and aggregation."""

    name: ClassVar[str] = "sppruner"

    mode: str = "pre"
    """"pre" spends the budget in front of the decoder. With "pre+mid" it is the average over the
    decoder's layers: 1.5 times as many tokens enter, and in front of the middle layer 0.5 times as
    many are kept, by the attention of the last prompt token in the layer before; the split of
    VScan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "mode", ("pre", "pre+mid"))

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

    def flops(self, tokens: int, kept: int, width: int) -> int:
        """The cosines of all pairs and, for coherence, those of the eight neighbours, with encoder
        states counted at the features' width."""
        return cosine_flops(tokens, width) + (8 * tokens * width if self.mu else 0)
