"""The baselines `random`, `grid` and `topk`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sppruner.signals import ATTENTION
from tests.sppruner.selectors.images import choose, make


def test_random_draws_differ_between_images_and_seeds_and_repeat_otherwise() -> None:
    one, other = make(8, 8, seed=1), make(8, 8, seed=2)
    draws = [choose("random", [one], [16], seed=s)[0].index_K for s in (0, 0, 1)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    assert not draws[0].equal(choose("random", [other], [16])[0].index_K)


@pytest.mark.parametrize("k", range(4, 60))
def test_grid_covers_every_quadrant_about_equally(k: int) -> None:
    image = make(8, 8)
    cells = image.coords_N2[choose("grid", [image], [k])[0].index_K] // 4
    quadrants = torch.bincount(cells[:, 0] * 2 + cells[:, 1], minlength=4)
    assert quadrants.min() >= 1
    assert quadrants.max() - quadrants.min() <= max(2, k // 4)


def test_topk_keeps_the_most_salient_tokens_and_the_first_on_ties() -> None:
    image = make(4, 4)
    saliency = torch.tensor([0.0, 5, 3, 5] + [3.0] * 12)
    image = replace(image, signals={ATTENTION: saliency})
    assert choose("topk", [image], [4])[0].index_K.tolist() == [1, 2, 3, 4]


def test_feature_saliency_finds_the_region_unlike_the_rest() -> None:
    image = make(6, 6)
    features = torch.ones(36, 16)
    odd = [14, 15, 20, 21]
    features[odd] = -features[odd] + torch.arange(16) * 0.1
    image = replace(image, features_ND=features, hidden_NV=None, signals={})
    assert choose("topk", [image], [4], saliency="feature")[0].index_K.tolist() == odd
