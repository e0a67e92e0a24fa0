"""The values that cross the library: visual tokens, selections and reports.

Shape suffixes used throughout the package: N visual tokens of one image, K kept tokens, D width of
the language model, V width of the vision encoder, B batch rows, S sequence length, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sppruner.errors import SpecError
from sppruner.spec import PruneSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VisualTokens:
    """One image as a selector sees it; never the model.

    features_ND: projected features, as the language model will read them.
    hidden_NV: encoder states the features were projected from, or None.
    coords_N2: (row, column) of each token on the image's token grid, integer.
    signals: what the method asked for, by name (`sppruner.signals`), each of shape [N].
    relevance_N: text relevance if the method asked for it and it could be computed, else None.
    row, image: which prompt of the batch, and which image within it.
    """

    features_ND: Tensor
    hidden_NV: Tensor | None
    coords_N2: Tensor
    signals: Mapping[str, Tensor]
    relevance_N: Tensor | None = None
    row: int = 0
    image: int = 0

    @property
    def count(self) -> int:
        return int(self.features_ND.shape[0])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) spanned by the coordinates."""
        if self.count == 0:
            return 0, 0
        last = self.coords_N2.max(dim=0).values + 1
        return int(last[0]), int(last[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What a selector returns: kept indices in raster order and, if it merges, new features.

    index_K: sorted, unique, int64. replace_KD: features for the kept tokens (same order) or None.
    focus_K: True where the token was kept as a subject, for pictures; None if the method has no
    such notion.
    """

    index_K: Tensor
    replace_KD: Tensor | None = None
    focus_K: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index_K.dtype != torch.int64:
            raise SpecError(f"selection indices are {self.index_K.dtype}, not int64")

    @property
    def count(self) -> int:
        return int(self.index_K.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """Proof of what happened to one prompt, counted on the tensors the model was given."""

    spec: PruneSpec
    visual_tokens: int
    visual_tokens_kept: int
    prompt_tokens: int
    prompt_tokens_dense: int
