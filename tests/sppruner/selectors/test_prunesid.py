"""PruneSID equals a plain reference under each of its switches; quotas and dynamic budgets hold."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppruner import Pruner
from sppruner.errors import SpecError
from sppruner.selectors import selector_for
from sppruner.selectors.prunesid import PruneSIDSelector, quotas
from sppruner.signals import ATTENTION
from sppruner.spec import Budget, PruneSpec
from sppruner.types import VisualTokens
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.rows import one_row
from tests.sppruner.selectors.images import choose, doubled, make, unit

SWITCHES = {
    "center": ("token", "feature"),
    "score": ("attention", "loading"),
    "tau_mode": ("llava", "qwen"),
    "quota": ("survivors", "size"),
}


def alike(image: VisualTokens, share: float) -> VisualTokens:
    """The same plane with a common part in all states, so that its mean cosine is about `share`."""
    assert image.hidden_NV is not None
    common = math.sqrt(share) * torch.ones(image.hidden_NV.shape[1])
    return replace(image, hidden_NV=common + math.sqrt(1 - share) * image.hidden_NV)


def reference(image: VisualTokens, k: int, m: PruneSIDSelector) -> list[int]:
    z = doubled(image.hidden_NV)
    n = len(z)
    x = (1 / (1 + np.exp(-z))).T
    x = x - x.mean(axis=0 if m.center == "token" else 1, keepdims=True)
    loading = np.abs(
        np.linalg.svd(x, full_matrices=False)[2][: max(1, min(k // 4, z.shape[1] - 1))]
    ).T
    group = loading.argmax(axis=1)
    score = doubled(image.signals[ATTENTION]) if m.score == "attention" else loading.max(axis=1)

    cosine = unit(z) @ unit(z).T
    if m.tau_mode == "llava":
        tau = k / 32 * cosine[np.triu_indices(n, 1)].mean()
    else:
        tau = max(18 * k / n, 1) * np.triu(cosine).mean()

    ranked = np.argsort(-score, kind="stable").tolist()
    queues: list[list[int]] = []
    alive: list[int] = []
    for g in range(loading.shape[1]):
        survivors: list[int] = []
        for i in ranked:
            if group[i] == g and all(cosine[i, j] <= tau for j in survivors):
                survivors.append(i)
        queues.append(survivors + [i for i in ranked if group[i] == g and i not in survivors])
        alive.append(len(survivors))

    sizes, left = np.array([len(q) for q in queues]), np.array(alive)
    most = np.minimum(5 * -(-k // 64), left)
    while most.sum() < k:
        most = np.minimum(most + 1, sizes)
    given_G = np.minimum(1, sizes)
    weight = left if m.quota == "survivors" else sizes
    extra = k - given_G.sum()
    running = np.floor(extra * np.cumsum(weight) / weight.sum() + 0.5)
    given_G = np.minimum(given_G + np.diff(running, prepend=0), most).astype(int)
    for g in np.argsort(-left, kind="stable"):
        while given_G.sum() < k and given_G[g] < most[g]:
            given_G[g] += 1
    return sorted(i for q, count in zip(queues, given_G, strict=True) for i in q[:count])


@pytest.mark.parametrize("values", list(itertools.product(*SWITCHES.values())))
def test_it_equals_the_plain_reference_under_every_switch(values: tuple[str, ...]) -> None:
    options: dict[str, Any] = dict(zip(SWITCHES, values, strict=True))
    for seed, grid, share in ((1, (6, 6), 0.0), (2, (4, 9), 0.3), (3, (12, 12), 0.6)):
        image = alike(make(*grid, seed=seed), share)
        for k in (1, 5, image.count // 5, image.count // 2, image.count - 1):
            kept = choose("prunesid", [image], [k], **options)[0].index_K.tolist()
            assert kept == reference(image, k, PruneSIDSelector(**options))


def test_attention_is_asked_for_only_where_it_is_the_score() -> None:
    loading = selector_for(PruneSpec(method="prunesid", options={"score": "loading"}))
    usual = selector_for(PruneSpec(method="prunesid"))
    assert loading is not None
    assert usual is not None
    assert not loading.signals
    assert usual.signals == {ATTENTION}
    image = replace(make(6, 6), signals={})
    assert choose("prunesid", [image], [9], score="loading")[0].count == 9


@given(data=st.data(), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=20))
def test_quotas_add_up_within_their_groups_and_leave_no_group_out(
    data: st.DataObject, sizes: list[int]
) -> None:
    occupied = sum(size > 0 for size in sizes)
    if sum(sizes) <= occupied:
        return
    k = data.draw(st.integers(max(1, occupied), sum(sizes) - 1))
    left = [data.draw(st.integers(min(1, size), size)) for size in sizes]
    shared = quotas(k, sizes, left, left)
    assert sum(shared) == k
    for size, survivors, quota in zip(sizes, left, shared, strict=True):
        assert min(1, size) <= quota <= size
        # No suppressed token is kept as long as the survivors alone fill the budget.
        if sum(min(5 * math.ceil(k / 64), s) for s in left) >= k:
            assert quota <= survivors


def test_information_is_the_spread_of_the_states_over_the_usual_one() -> None:
    plain, crowded = make(8, 8), alike(make(8, 8), 0.8)
    phi = []
    for image in (plain, crowded):
        z = unit(doubled(image.hidden_NV))
        phi.append(1 - (z @ z.T)[np.triu_indices(64, 1)].mean())
        got = PruneSIDSelector(usual_information=0.25).information([image])
        assert got == pytest.approx(phi[-1] / 0.25, rel=1e-5)
    small = alike(make(4, 4), 0.8)
    one, other = (PruneSIDSelector().information([image]) for image in (crowded, small))
    both = PruneSIDSelector().information([crowded, small])
    assert both == pytest.approx((64 * one + 16 * other) / 80)


@given(
    share=st.floats(0, 1), spread=st.floats(0, 0.9), ratio=st.floats(0.05, 1), n=st.integers(1, 99)
)
def test_a_dynamic_budget_stays_within_its_spread_and_its_image(
    share: float, spread: float, ratio: float, n: int
) -> None:
    budget = Budget(ratio=ratio, spread=spread)
    weight = PruneSIDSelector().information([alike(make(1, n), share)])
    k = budget.reweighted(budget.count(n), n, weight)
    low, high = budget.bounds(n)
    assert low <= k <= high <= n


def test_only_a_method_that_measures_images_takes_a_budget_with_spread() -> None:
    budget: Any = Budget(ratio=0.5, spread=0.3)
    PruneSIDSelector().check(budget, None)  # type: ignore[arg-type]
    topk = selector_for(PruneSpec(method="topk"))
    assert topk is not None
    with pytest.raises(SpecError, match="such as 'prunesid'"):
        topk.check(budget, None)  # type: ignore[arg-type]


def test_a_dynamic_budget_through_a_model_does_not_depend_on_the_batch() -> None:
    """Every prompt keeps what its own image's information gives it, whoever its batch-mates are."""
    pruner = Pruner(FAMILIES["llava"].build())
    inputs = FAMILIES["llava"].batch([1, 1, 1])
    budget = Budget(ratio=0.4, spread=0.5)
    plain = pruner.prepare(inputs, PruneSpec(method="prunesid", budget=Budget(ratio=0.4)))
    # Of three images, each in units of the default 0.5.
    usual = sum(PruneSIDSelector().information([plane]) for plane, _ in plain.selections) / 6
    spec = PruneSpec(method="prunesid", budget=budget, options={"usual_information": usual})
    together = pruner.prepare(inputs, spec)
    for row, report in enumerate(together.reports):
        alone = pruner.prepare(one_row(pruner.adapter, inputs, row), spec)
        assert report.visual_tokens_kept == alone.reports[0].visual_tokens_kept
        measured = PruneSIDSelector(usual_information=usual)
        weight = measured.information([together.selections[row][0]])
        n = report.visual_tokens
        assert report.visual_tokens_kept == budget.reweighted(budget.count(n), n, weight)
        assert together.selections[row][1].index_K.equal(alone.selections[0][1].index_K)
