"""Cosines, greedy selection and merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sppruner.selectors.similarity import (
    GreedySubset,
    cosines_INN,
    mean_cosine,
    merge_tokens,
    most_similar,
    products_NN,
)
from tests.sppruner.selectors.images import doubled, unit


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_half_the_blocks_and_their_mirror_are_all_products(n: int) -> None:
    rows = torch.randn(n, 24, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    products = products_NN(rows)
    torch.testing.assert_close(products, rows @ rows.T)
    assert products[128:, :128].equal(products[:128, 128:].T), "the mirror is exact"


def test_cosines_are_each_images_own_to_the_last_bit() -> None:
    states = [torch.randn(200, 33, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for together, one in zip(cosines_INN(states), states, strict=True):
        assert together.equal(cosines_INN([one])[0])


def test_the_mean_cosine_needs_no_pairs() -> None:
    states = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    z = unit(doubled(states))
    pairs = (z @ z.T)[np.triu_indices(50, 1)]
    assert float(mean_cosine(states)) == pytest.approx(pairs.mean(), abs=1e-6)
    assert float(mean_cosine(states[:1])) == 1.0


def test_an_inactive_image_does_not_change() -> None:
    states = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    cosine = cosines_INN(states)
    subset = GreedySubset(cosine)
    score = torch.arange(9.0).expand(2, 9)
    subset.add_best(score, torch.tensor([True, False]))
    subset.add_best(score, torch.tensor([True, False]))
    assert subset.selected_IN[0].nonzero().flatten().tolist() == [7, 8]
    assert subset.nearest_IN[0].equal(torch.maximum(cosine[0, 7], cosine[0, 8]))
    assert not subset.selected_IN[1].any()
    assert (subset.nearest_IN[1] == -1).all()


def test_adding_a_mask_equals_adding_its_tokens_one_by_one() -> None:
    states = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mask = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0, 0], [0] * 9]).bool()
    by_mask, one_by_one = GreedySubset(cosines_INN(states)), GreedySubset(cosines_INN(states))
    by_mask.add_mask(mask)
    for token in (1, 4):
        one_by_one.add_best(torch.eye(9)[token].expand(2, 9), torch.tensor([True, False]))
    assert by_mask.selected_IN.equal(one_by_one.selected_IN)
    assert by_mask.nearest_IN.equal(one_by_one.nearest_IN)


def test_merging_is_a_weighted_mean_at_each_target() -> None:
    features = torch.tensor([[1.0], [10.0], [2.0], [4.0], [7.0]])
    weight = torch.tensor([1.0, 1.0, 3.0, 1.0, 5.0])
    target, source = torch.tensor([0, 1]), torch.tensor([2, 3])
    similarity = torch.tensor([[0.9, 0.1], [0.3, 0.2]])
    merged, received = merge_tokens(features, weight, target, source, similarity)
    assert merged.flatten().tolist() == pytest.approx([(1 + 3 * 2 + 4) / 5, 10.0])
    assert received.flatten().tolist() == [True, False]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12, 1e-30])
def test_a_mean_is_exact_however_small_its_weights_are(scale: float) -> None:
    """To 1e-6 of a token's norm. Adding 1e-6 to weights of about 1e-6 gave errors of tens of
    percent."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 64, generator=generator)
    weight = torch.rand(40, generator=generator) ** 3 * scale
    target, source = torch.arange(8), torch.arange(8, 40)
    similarity = torch.rand(32, 8, generator=generator)

    def exact(weight_N: torch.Tensor) -> torch.Tensor:
        means = []
        for place in range(8):
            group = [place, *source[similarity.argmax(dim=1) == place].tolist()]
            weights = weight_N[group].double()
            means.append(weights @ features[group].double() / weights.sum())
        return torch.stack(means)

    expected = exact(weight)
    merged, _ = merge_tokens(features, weight, target, source, similarity)
    off = (merged - expected).norm(dim=1) / expected.norm(dim=1)
    assert off.max() < 1e-6
    if scale == 1e-6:
        biased = exact(weight + 1e-6)
        assert ((biased - expected).norm(dim=1) / expected.norm(dim=1)).max() > 0.2


def test_a_group_without_any_weight_gets_its_plain_mean() -> None:
    features = torch.tensor([[1.0], [10.0], [2.0], [6.0], [4.0]])
    weight = torch.tensor([0.0, 0.0, 0.0, 0.0, 1e-30])
    target, source = torch.tensor([0, 1]), torch.tensor([2, 3, 4])
    similarity = torch.tensor([[0.9, 0.1], [0.3, 0.2], [0.1, 0.5]])
    merged, received = merge_tokens(features, weight, target, source, similarity)
    assert merged.flatten().tolist() == pytest.approx([3.0, 4.0])
    assert received.all()


def test_the_most_similar_come_first_and_ties_keep_their_order() -> None:
    similarity = torch.tensor([[0.1, 0.5], [0.7, 0.0], [0.5, 0.2], [0.5, 0.5]])
    assert most_similar(similarity, 3).tolist() == [1, 0, 2]
