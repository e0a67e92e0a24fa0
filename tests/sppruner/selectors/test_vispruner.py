"""VisPruner equals a plain reference that goes through its rounds one token at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sppruner.signals import ATTENTION
from sppruner.types import VisualTokens
from tests.sppruner.selectors.images import choose, doubled, make, unit


def reference(image: VisualTokens, k: int, share: float) -> tuple[list[int], list[int]]:
    order = np.argsort(-doubled(image.signals[ATTENTION]), kind="stable").tolist()
    important, rest = order[: int(share * k)], order[int(share * k) :]
    left = k - len(important)
    z = unit(doubled(image.features_ND if image.hidden_NV is None else image.hidden_NV))
    while left and len(rest) > left:
        first, second = rest[::2], rest[1::2]
        alike = {i: max(float(z[i] @ z[j]) for j in second) for i in first}
        first.sort(key=lambda i: -alike[i])
        rest = first[min(8, len(rest) - left) :] + second
    return sorted(important), sorted(important + (rest if left else []))


@pytest.mark.parametrize("grid", [(5, 5), (4, 9), (12, 12)])
@pytest.mark.parametrize("share", [0.03, 0.111, 0.333, 0.9])
@pytest.mark.parametrize("options", [{}, {"important": 0.0}, {"important": 0.75}])
def test_it_equals_the_plain_reference(
    grid: tuple[int, int], share: float, options: dict[str, Any]
) -> None:
    for seed, projected in ((1, False), (2, True)):
        image = make(*grid, seed=seed)
        image = replace(image, hidden_NV=None) if projected else image
        k = max(1, round(share * image.count))
        chosen = choose("vispruner", [image], [k], **options)[0]
        important, kept = reference(image, k, options.get("important", 0.5))
        assert chosen.index_K.tolist() == kept
        assert chosen.index_K[chosen.focus_K].tolist() == important


def test_all_important_is_the_top_of_attention() -> None:
    image = make(8, 8)
    chosen = choose("vispruner", [image], [20], important=1.0)[0]
    assert chosen.index_K.equal(choose("topk", [image], [20])[0].index_K)
