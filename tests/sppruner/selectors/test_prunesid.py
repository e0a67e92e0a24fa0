"""PruneSID equals a plain reference under each of its options; quotas and dynamic budgets hold."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppruner import Pruner
from sppruner.errors import SpecError
from sppruner.evaluation import drawn_scenes
from sppruner.models.loading import load_model
from sppruner.prompts import build_inputs
from sppruner.selectors import selector_for
from sppruner.selectors.prunesid import PruneSIDSelector, quotas
from sppruner.signals import ATTENTION
from sppruner.spec import Budget, PruneSpec
from sppruner.types import VisualTokens
from tests.sppruner.families import FAMILIES, pruner_of
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
    share = weight.astype(np.float32) / np.float32(weight.sum())
    # As PyTorch sums fp32 on a CPU.
    running = np.round(np.cumsum(share, dtype=np.float64).astype(np.float32) * np.float32(extra))
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


def test_attention_is_read_only_if_it_is_the_score() -> None:
    loading = selector_for(PruneSpec(method="prunesid", options={"score": "loading"}))
    usual = selector_for(PruneSpec(method="prunesid"))
    assert loading is not None
    assert usual is not None
    assert not loading.signals
    assert usual.signals == {ATTENTION}
    image = replace(make(6, 6), signals={})
    assert choose("prunesid", [image], [9], score="loading")[0].count == 9


def official_qwen(features_ND: torch.Tensor, need: int) -> set[int]:
    """What the authors' code for Qwen2-VL keeps of an image's merged features at `need` tokens of
    576 (`Qwen2VisionTransformerPretrainedModel_prunesid` of ZhengyaoFang/PruneSID at 390d760, read
    and restated here), but for its decomposition: `torch.pca_lowrank` draws a random projection,
    this one is exact, in fp64."""
    n = len(features_ND)
    wanted = max(round(n * need / 576), 16)
    if n <= 16:
        return set(range(n))
    squashed_DN = torch.sigmoid(features_ND.float()).T.double()
    centred_DN = squashed_DN - squashed_DN.mean(dim=0)
    components = torch.linalg.svd(centred_DN, full_matrices=False).Vh[: max(wanted // 4, 4)]
    loading_NG = components.T.abs().float()
    group_N = loading_NG.argmax(dim=1)

    unit_ND = torch.nn.functional.normalize(features_ND, dim=-1)
    product_NN = unit_ND @ unit_ND.T
    cosine_NN = product_NN.tolist()
    threshold = max(wanted / (n / 18), 1) * float(product_NN.triu().mean())
    queues, alive = [], []
    for g in range(loading_NG.shape[1]):
        ranked = loading_NG[:, g].argsort(descending=True).tolist()
        ranked = [i for i in ranked if group_N[i] == g]
        survivors: list[int] = []
        left = ranked
        while left:
            survivors.append(left[0])
            left = [i for i in left[1:] if cosine_NN[survivors[-1]][i] <= threshold]
        queues.append(survivors + [i for i in ranked if i not in survivors])
        alive.append(len(survivors))

    size_G, alive_G = torch.tensor([len(q) for q in queues]), torch.tensor(alive)
    lower_G = size_G.clamp(max=1)
    upper_G = alive_G.clamp(max=5 * math.ceil(wanted / 64))
    while upper_G.sum() < wanted:
        upper_G = torch.minimum(upper_G + 1, size_G)
    others = max(0, wanted - int(lower_G.sum()))
    running_G = ((alive_G / alive_G.sum()).cumsum(dim=0) * others).round().int()
    given_G = torch.minimum(running_G.diff(prepend=running_G.new_zeros(1)) + lower_G, upper_G)
    # The code's sort does not define the order of ties.
    for g in alive_G.argsort(descending=True, stable=True).tolist():
        given_G[g] += min(upper_G[g] - given_G[g], others + lower_G.sum() - given_G.sum())
    return {i for queue, count in zip(queues, given_G.tolist(), strict=True) for i in queue[:count]}


@cache
@torch.no_grad()
def qwen_planes() -> tuple[Pruner, list[VisualTokens]]:
    """The trained tiny Qwen2.5-VL, and planes of 24 × 24 tokens of three drawn scenes, with their
    saliency."""
    loaded = load_model("tiny-qwen")
    pruner = Pruner(loaded.model)
    planes: list[VisualTokens] = []
    loaded.processor.image_processor.size = {"shortest_edge": 192**2, "longest_edge": 192**2}
    for item in islice(drawn_scenes(400).items, 0, 400, 140):
        inputs = build_inputs(
            loaded.processor, [item.prompt], [(item.image().resize((192, 192)),)], [None]
        )
        planes += pruner.adapter.encode(dict(inputs), frozenset({ATTENTION})).images[0].planes
    assert [plane.grid for plane in planes] == [(24, 24)] * 3
    return pruner, planes


def overlap_with_official(need: int, **options: Any) -> float:
    """Share of the official tokens that the method keeps, over `qwen_planes`."""
    pruner, planes = qwen_planes()
    selector = selector_for(PruneSpec(method="prunesid", options=options))
    assert selector is not None
    chosen = selector.resolve_for(pruner.adapter.capabilities).select(planes, [need] * len(planes))
    expected = [official_qwen(plane.features_ND, need) for plane in planes]
    assert [len(one) for one in expected] == [need] * len(planes)
    shared = sum(len(a & set(b.index_K.tolist())) for a, b in zip(expected, chosen, strict=True))
    return shared / (need * len(planes))


@pytest.mark.parametrize(("need", "of_encoder"), [(192, 0.45), (128, 0.38), (64, 0.34), (32, 0.26)])
def test_on_qwen_the_selection_is_that_of_the_authors_code(need: int, of_encoder: float) -> None:
    """Overlap 1.000 with the options of the code for Qwen2-VL, on CPU, where fp32 sums are those of
    the code. Ranked by attention, or on encoder states, it is far less; chance is need / 576."""
    code = {"score": "loading", "tau_mode": "qwen"}
    assert overlap_with_official(need, **code) == 1.0
    assert overlap_with_official(need) < 0.8
    assert overlap_with_official(need, features="encoder") == pytest.approx(of_encoder, abs=0.03)


def test_merged_tokens_are_grouped_by_their_merged_features() -> None:
    """As in the authors' code; one patch a token is grouped by its encoder state."""
    for family in FAMILIES:
        can = pruner_of(family).adapter.capabilities
        resolved = PruneSIDSelector().resolve_for(can)
        assert resolved.features == ("projected" if can.merged else "encoder")
        assert resolved.resolve_for(can) == resolved
        chosen = PruneSIDSelector(features="encoder")
        assert chosen.resolve_for(can) == chosen
    merged = {family for family in FAMILIES if pruner_of(family).adapter.capabilities.merged}
    assert {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"} <= merged
    assert not {"llava", "llava_next"} & merged


def test_the_features_of_a_spec_reach_the_selection() -> None:
    pruner = pruner_of("qwen2_vl")
    inputs = FAMILIES["qwen2_vl"].batch([1, 1])
    default = PruneSpec(method="prunesid", budget=Budget(ratio=0.4))
    loading = replace(default, options={"score": "loading"})
    assert pruner.signals([default]) == {ATTENTION}
    assert pruner.signals([loading]) == frozenset()

    def kept(spec: PruneSpec) -> list[list[int]]:
        return [choice.index_K.tolist() for _, choice in pruner.prepare(inputs, spec).selections]

    assert kept(default) == kept(replace(default, options={"features": "projected"}))
    assert kept(default) != kept(replace(default, options={"features": "encoder"}))


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
        # No suppressed token is kept if the survivors fill the budget.
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
    """Every prompt keeps the count of its own image's information, for any batch-mates."""
    pruner = Pruner(FAMILIES["llava"].build())
    inputs = FAMILIES["llava"].batch([1, 1, 1])
    budget = Budget(ratio=0.4, spread=0.5)
    plain = pruner.prepare(inputs, PruneSpec(method="prunesid", budget=Budget(ratio=0.4)))
    # Of three images, each in units of the default 0.5.
    usual = sum(PruneSIDSelector().information([plane]) for plane, _ in plain.selections) / 6
    spec = PruneSpec(method="prunesid", budget=budget, options={"usual_information": usual})
    together = pruner.prepare(inputs, spec)
    for row, report in enumerate(together.reports):
        single = pruner.prepare(one_row(pruner.adapter, inputs, row), spec)
        assert report.visual_tokens_kept == single.reports[0].visual_tokens_kept
        measured = PruneSIDSelector(usual_information=usual)
        weight = measured.information([together.selections[row][0]])
        n = report.visual_tokens
        assert report.visual_tokens_kept == budget.reweighted(budget.count(n), n, weight)
        assert together.selections[row][1].index_K.equal(single.selections[0][1].index_K)
