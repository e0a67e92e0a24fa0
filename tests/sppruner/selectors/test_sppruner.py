"""SPpruner-R equals a plain reference and, with certain options, related methods."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppruner.selectors.sppruner import SPprunerSelector
from sppruner.signals import ATTENTION
from sppruner.types import VisualTokens
from tests.sppruner.selectors.images import (
    Array,
    choose,
    farthest_points,
    make,
    same,
    scaled,
    unit,
)


def reference_phi(image: VisualTokens, m: SPprunerSelector) -> Array:
    raw = image.signals[ATTENTION].double().numpy()
    s = scaled(np.minimum(raw, np.quantile(raw, m.percentile)))
    r, lam = np.zeros_like(s), 0.0
    if image.relevance_N is not None:
        text = image.relevance_N.double().numpy()
        features = unit(image.features_ND.double().numpy())
        chance = math.sqrt(features.var(axis=0).mean())
        if text.std(ddof=1) > m.relevance_floor * chance:
            r, lam = scaled(text), m.lam
    agreement = s**m.beta * r**m.alpha
    if m.root:
        agreement **= 1 / (m.alpha + m.beta)
    phi = lam * agreement + (1 - lam) * (1 - (1 - s) * (1 - m.eta * r))
    assert image.hidden_NV is not None
    z = unit(image.hidden_NV.double().numpy())
    spread = phi.copy()
    for i, p in enumerate(image.coords_N2.tolist()):
        weight = total = 0.0
        for j, q in enumerate(image.coords_N2.tolist()):
            if i != j and max(abs(p[0] - q[0]), abs(p[1] - q[1])) <= 1:
                likeness = max(0.0, float(z[i] @ z[j]))
                weight, total = weight + likeness, total + likeness * phi[j]
        spread[i] = (1 - m.mu) * phi[i] + m.mu * (total / weight if weight else 0.0)
    return spread


def reference(
    image: VisualTokens, k: int, m: SPprunerSelector
) -> tuple[list[int], list[int], Array]:
    """Focus and context in the order of selection, and every token's features after merging."""
    phi = reference_phi(image, m)
    features = image.features_ND.double().numpy()
    v, coords = unit(features), image.coords_N2.double().numpy()
    cosine = v @ v.T
    apart = ((coords[:, None] - coords[None]) ** 2).sum(-1)
    side = float(coords.max()) + 1

    energy = np.cumsum(np.sort(phi**m.energy)[::-1])
    enough = int((energy < m.rho * energy[-1]).sum()) + 1
    size = min(max(enough, round(m.focus_min * k)), round(m.focus_max * k))
    focus: list[int] = []
    for _ in range(size):
        best, best_score = -1, -math.inf
        for i in set(range(len(phi))) - set(focus):
            near = max((cosine[i, j] for j in focus), default=-1.0)
            penalty = max(0.0, near - m.redundancy) / (1 - m.redundancy) if m.redundancy < 1 else 0
            score = phi[i] * (1 - min(penalty, 1))
            if score > best_score:
                best, best_score = i, score
        focus.append(best)

    sigma = m.sigma * side
    proximity = [
        max((phi[j] * math.exp(-apart[i, j] / (2 * sigma**2)) for j in focus), default=0.0)
        for i in range(len(phi))
    ]
    context: list[int] = [] if focus else [int(phi.argmax())]

    def add(candidates: set[int]) -> None:
        kept = focus + context
        score = {
            i: (1 - cosine[i, kept].max()) * (m.proximity_floor + proximity[i]) ** m.omega
            for i in candidates - set(kept)
        }
        context.append(max(score, key=lambda i: score[i]))

    if m.windows:
        extent = coords.max(axis=0) + 1
        cell = (coords * m.windows // extent).astype(int)
        windows: dict[tuple[int, ...], set[int]] = {}
        for i, w in enumerate(map(tuple, cell.tolist())):
            windows.setdefault(w, set()).add(i)
        empty = [w for w in windows.values() if not w & set(focus + context)]
        empty.sort(key=lambda w: -phi[list(w)].mean())
        for window in empty[: (k - len(focus + context)) // 4]:
            add(window)
    while len(focus) + len(context) < k:
        add(set(range(len(phi))))

    merged = features.copy()
    homes = []
    for i in sorted(set(range(len(phi))) - set(focus + context)):
        likeness = {j: cosine[i, j] * math.exp(-apart[i, j] / (8 * sigma**2)) for j in context}
        if likeness:
            home = max(likeness, key=lambda j: likeness[j])
            homes.append((likeness[home], i, home))
    homes.sort(reverse=True)
    for c in context:
        guests = [i for _, i, home in homes[: int(m.kappa * len(context))] if home == c]
        if guests:
            group = [c, *guests]
            weight = phi[group] if phi[group].any() else np.ones(len(group))
            merged[c] = weight @ features[group] / weight.sum()
            if m.restore_norm:
                merged[c] *= np.linalg.norm(features[c]) / np.linalg.norm(merged[c])
    return focus, context, merged


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (12, 12)])
@pytest.mark.parametrize("share", [0.05, 0.222, 0.6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kappa": 3.0, "restore_norm": False, "redundancy": 0.2},
        {"windows": 3, "omega": 2.0, "alpha": 3.0, "sigma": 0.3, "rho": 0.3, "focus_min": 0.0},
        {"focus_min": 0.0, "focus_max": 0.0},
    ],
)
def test_selection_and_merging_equal_the_plain_reference(
    grid: tuple[int, int], share: float, options: dict[str, Any]
) -> None:
    for seed in (1, 2):
        image = make(*grid, seed=seed)
        k = max(1, round(share * image.count))
        chosen = SPprunerSelector(**options).select([image], [k])[0]
        focus, context, merged = reference(image, k, SPprunerSelector(**options))
        assert chosen.index_K.tolist() == sorted(focus + context)
        assert chosen.focus_K is not None
        assert chosen.index_K[chosen.focus_K].tolist() == sorted(focus)
        assert chosen.replace_KD is not None
        np.testing.assert_allclose(
            chosen.replace_KD.numpy(), merged[sorted(focus + context)], atol=1e-4
        )


PLAIN = {"omega": 0.0, "windows": 0, "redundancy": 1.0, "mu": 0.0, "percentile": 1.0, "kappa": 0.0}


def test_without_focus_it_is_farthest_point_sampling_from_the_largest_phi() -> None:
    bare = PLAIN | {"focus_min": 0.0, "focus_max": 0.0, "lam": 0.0, "eta": 0.0}
    for seed in range(3):
        image = make(8, 8, seed=seed)
        seed_token = int(image.signals[ATTENTION].argmax())
        for k in (1, 2, 15, 40):
            kept = choose("sppruner", [image], [k], **bare)[0]
            assert kept.index_K.tolist() == farthest_points(image, [seed_token], k)
            assert kept.focus_K is not None
            assert not kept.focus_K.any()


def test_focus_alone_without_text_is_the_top_k_of_saliency() -> None:
    focus_only = PLAIN | {"focus_min": 1.0, "focus_max": 1.0, "lam": 0.0, "eta": 0.0}
    for seed in range(3):
        image = make(8, 8, seed=seed)
        top = choose("topk", [image], [20])[0]
        assert choose("sppruner", [image], [20], **focus_only)[0].index_K.equal(top.index_K)


def test_redundancy_one_does_not_penalise_duplicates() -> None:
    """The cosine of a token and its duplicate may exceed 1 by rounding; that is no redundancy."""
    image = make(8, 8, width=48)
    doubled_ND = image.features_ND[:32].repeat_interleave(2, dim=0)
    fading = torch.linspace(1, 0.5, 64)
    image = replace(image, features_ND=doubled_ND, signals={ATTENTION: fading}, relevance_N=None)
    focus_only = PLAIN | {"focus_min": 1.0, "focus_max": 1.0}
    assert choose("sppruner", [image], [20], **focus_only)[0].index_K.tolist() == list(range(20))


def test_agreement_alone_ranks_and_scans_as_fsr_does() -> None:
    fsr = PLAIN | {"lam": 1.0, "alpha": 3.0, "beta": 1.0, "focus_min": 0.5, "focus_max": 0.5}
    for seed in range(3):
        image = make(8, 8, seed=seed)
        s = scaled(image.signals[ATTENTION].double().numpy())
        assert image.relevance_N is not None
        r = scaled(image.relevance_N.double().numpy())
        focus = (-(r**3) * s).argsort(kind="stable")[:10].tolist()
        kept = choose("sppruner", [image], [20], **fsr)[0]
        assert kept.index_K[kept.focus_K].tolist() == sorted(focus)
        assert kept.index_K.tolist() == farthest_points(image, focus, 20)


def test_text_is_used_only_if_its_relevance_differs_between_tokens() -> None:
    image = make(8, 8)
    assert image.relevance_N is not None
    textless = replace(image, relevance_N=None)
    faint = replace(image, relevance_N=0.001 * image.relevance_N)
    without = choose("sppruner", [textless], [16])[0]
    assert same(choose("sppruner", [faint], [16])[0], without)
    assert not same(choose("sppruner", [image], [16])[0], without)


@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
def test_a_named_subject_is_used_and_the_mean_of_unrelated_words_is_not(scale: float) -> None:
    """For any spread of cosines between a model's spaces."""
    image = make(8, 8, width=64)
    generator = torch.Generator().manual_seed(5)
    background, subject = torch.randn(2, 64, generator=generator)
    features = background + scale * 0.3 * image.features_ND
    features[20:26] += scale * subject
    words = torch.randn(40, 64, generator=generator)

    def cosine(word_D: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(features, word_D, dim=1)

    textless = replace(image, features_ND=features, relevance_N=None)
    named = replace(textless, relevance_N=cosine(subject))
    vague = replace(textless, relevance_N=torch.stack([cosine(w) for w in words]).mean(dim=0))
    without = choose("sppruner", [textless], [12])[0]
    assert same(choose("sppruner", [vague], [12])[0], without)
    assert not same(choose("sppruner", [named], [12])[0], without)


@given(k=st.integers(1, 63), seed=st.integers(0, 50))
def test_the_focus_stays_within_its_share_of_the_budget(k: int, seed: int) -> None:
    chosen = choose("sppruner", [make(8, 8, seed=seed)], [k])[0]
    assert round(0.35 * k) <= int(chosen.focus_K.sum()) <= round(0.65 * k)


def test_merging_changes_context_only_and_keeps_its_norms() -> None:
    image = make(8, 8)
    chosen = choose("sppruner", [image], [16], kappa=2.0)[0]
    before, after = image.features_ND[chosen.index_K], chosen.replace_KD
    assert after[chosen.focus_K].equal(before[chosen.focus_K])
    changed = (after != before).any(dim=1)
    assert changed.any()
    assert not (changed & chosen.focus_K).any()
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    assert choose("sppruner", [image], [16], kappa=0.0)[0].index_K.equal(chosen.index_K)


def test_options_far_above_what_an_image_has_cost_no_more_than_the_image_allows() -> None:
    """More windows than tokens, and more merges than dropped tokens, are as many as there are."""
    image = make(rows=4, columns=6, seed=3)
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"windows": 10**6}, {"windows": 6}),
        ({"kappa": 1e6}, {"kappa": 24.0}),
    ]
    for large, enough in pairs:
        (found,) = SPprunerSelector(**large).select([image], [9])
        (expected,) = SPprunerSelector(**enough).select([image], [9])
        assert same(found, expected)
