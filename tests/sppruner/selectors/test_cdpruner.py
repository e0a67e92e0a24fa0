"""CDPruner's Cholesky rows select the tokens that determinants computed from scratch select."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sppruner.types import VisualTokens
from tests.sppruner.selectors.images import Array, choose, doubled, make, unit


def quality(image: VisualTokens, theta: float) -> Array:
    if image.relevance_N is None:
        return np.ones(image.count)
    r = doubled(image.relevance_N)
    scaled = (r - r.min() + 1e-6) / (r.max() - r.min())
    return scaled if theta == 1 else np.exp(theta / (2 * (1 - theta)) * scaled)


def greedy(image: VisualTokens, q: Array, among: range, k: int) -> list[int]:
    """Adds, at each step, the token that maximises the log-determinant of the kept block of L."""
    v = unit(doubled(image.features_ND))
    kernel = q[:, None] * (v @ v.T) * q
    kept: list[int] = []
    for _ in range(k):
        candidates = [i for i in among if i not in kept]
        volume = [np.linalg.slogdet(kernel[np.ix_([*kept, i], [*kept, i])])[1] for i in candidates]
        # Equal qualities tie at the first step: ties go to the first token, not to rounding.
        kept.append(candidates[int(np.argmax(np.round(volume, 9)))])
    return kept


@pytest.mark.parametrize("options", [{}, {"theta": 0.5}, {"theta": 0.9}, {"theta": 0.0}])
@pytest.mark.parametrize("with_text", [True, False])
def test_it_maximises_the_determinant_greedily(options: dict[str, Any], with_text: bool) -> None:
    for seed in (1, 2):
        image = make(6, 6, seed=seed, width=64)
        image = image if with_text else replace(image, relevance_N=None)
        q = quality(image, options.get("theta", 1.0))
        for k in (1, 7, 30):
            kept = choose("cdpruner", [image], [k], **options)[0].index_K.tolist()
            assert kept == sorted(greedy(image, q, range(36), k))


@pytest.mark.parametrize(("grid", "k"), [((6, 6), 9), ((5, 5), 12), ((1, 3), 1)])
def test_halves_are_selected_separately_and_share_the_budget(grid: tuple[int, int], k: int) -> None:
    image = make(*grid, width=64)
    n, q = image.count, quality(image, 1.0)
    kept = choose("cdpruner", [image], [k], split_halves=True)[0].index_K.tolist()
    first = [i for i in kept if i < n // 2]
    assert abs(len(first) - k * (n // 2) / n) < 1
    second = greedy(image, q, range(n // 2, n), k - len(first))
    assert kept == sorted(greedy(image, q, range(n // 2), len(first)) + second)


def test_beyond_the_rank_of_the_features_relevance_decides() -> None:
    """Beyond the rank of the features every determinant is 0; the most relevant tokens are kept."""
    image = make(6, 6, width=3)
    relevance = torch.rand(36, generator=torch.Generator().manual_seed(1))
    image = replace(image, relevance_N=relevance)
    kept = set(choose("cdpruner", [image], [20])[0].index_K.tolist())
    assert len(kept & set(relevance.argsort(descending=True)[:17].tolist())) >= 16


def test_a_theta_close_to_one_does_not_overflow() -> None:
    image = make(6, 6, width=64)
    kept = choose("cdpruner", [image], [9], theta=0.9999)[0]
    assert image.relevance_N is not None
    assert int(image.relevance_N.argmax()) in kept.index_K.tolist()
