"""DivPrune equals a plain greedy selection from the most isolated token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.sppruner.selectors.images import choose, doubled, farthest_points, make, unit


@pytest.mark.parametrize("grid", [(6, 6), (1, 30), (12, 12)])
def test_it_starts_at_the_most_isolated_token_then_farthest_first(
    grid: tuple[int, int],
) -> None:
    for seed in range(3):
        image = make(*grid, seed=seed)
        v = unit(doubled(image.features_ND))
        distance = 1 - v @ v.T
        np.fill_diagonal(distance, np.inf)
        first = int(distance.min(axis=1).argmax())
        for k in (1, 2, image.count // 3, image.count - 1):
            kept = choose("divprune", [image], [k])[0].index_K.tolist()
            assert kept == farthest_points(image, [first], k)


def test_no_duplicate_is_kept_before_every_distinct_token() -> None:
    image = make(4, 4)
    doubled_ND = image.features_ND.clone()
    doubled_ND[8:] = doubled_ND[:8]
    kept = choose("divprune", [replace(image, features_ND=doubled_ND)], [8])[0].index_K
    assert sorted((kept % 8).tolist()) == list(range(8))
