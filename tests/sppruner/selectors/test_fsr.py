"""FSR equals a plain reference of its equations; SPpruner-R without its additions is FSR."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sppruner.selectors.fsr import FSRSelector
from sppruner.signals import ATTENTION
from sppruner.types import VisualTokens
from tests.sppruner.selectors.images import (
    Array,
    choose,
    doubled,
    farthest_points,
    make,
    scaled,
    unit,
)

# Options that turn SPpruner-R into FSR: only the product, its mass, and an unweighted scan.
AS_FSR: dict[str, Any] = {
    "alpha": 3.0, "beta": 1.0, "root": False, "energy": 1.0, "rho": 0.9, "lam": 1.0, "mu": 0.0,
    "percentile": 1.0, "relevance_floor": 0.0, "focus_min": 0.0, "focus_max": 0.9,
    "redundancy": 1.0, "windows": 0, "omega": 0.0, "sigma": 1e6, "restore_norm": False,
}  # fmt: skip


def reference(image: VisualTokens, k: int, m: FSRSelector) -> tuple[list[int], list[int], Array]:
    """Focus, all kept tokens, and every token's features after refining; one token at a time."""
    s = scaled(doubled(image.signals[ATTENTION]))
    r = np.ones_like(s) if image.relevance_N is None else scaled(doubled(image.relevance_N))
    phi = r**m.alpha * s**m.beta
    order = np.argsort(-phi, kind="stable").tolist()
    size = 1
    while phi[order[:size]].sum() < m.rho * phi.sum():
        size += 1
    focus = order[: min(size, max(1, k - max(1, math.ceil(k / 10))))]
    kept = farthest_points(image, focus, k)

    features = doubled(image.features_ND)
    v = unit(features)
    scan = [i for i in kept if i not in focus]
    homes = []
    for i in sorted(set(range(len(phi))) - set(kept)):
        if scan:
            home = max(scan, key=lambda j: float(v[i] @ v[j]))
            homes.append((-float(v[i] @ v[home]), i, home))
    merged, groups = features.copy(), {j: [j] for j in scan}
    for _, i, home in sorted(homes)[: int(m.kappa * len(scan))]:
        groups[home].append(i)
    for home, group in groups.items():
        weight = phi[group] if phi[group].any() else np.ones(len(group))
        merged[home] = weight @ features[group] / weight.sum()
    return sorted(focus), kept, merged


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (12, 12)])
@pytest.mark.parametrize("share", [0.03, 0.111, 0.333, 0.9])
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.0, "kappa": 3.0}, {"rho": 0.2, "beta": 2.0}, {"relevance": "none"}]
)
def test_it_equals_the_plain_reference(
    grid: tuple[int, int], share: float, options: dict[str, Any]
) -> None:
    for seed in (1, 2):
        image = make(*grid, seed=seed)
        if options.get("relevance") == "none":
            image = replace(image, relevance_N=None)
        k = max(1, round(share * image.count))
        chosen = choose("fsr", [image], [k], **options)[0]
        focus, kept, merged = reference(image, k, FSRSelector(**options))
        assert chosen.index_K.tolist() == kept
        assert chosen.index_K[chosen.focus_K].tolist() == focus
        got = image.features_ND[kept] if chosen.replace_KD is None else chosen.replace_KD
        np.testing.assert_allclose(got.numpy(), merged[kept], atol=1e-5)


@pytest.mark.parametrize("with_text", [True, False])
def test_sppruner_with_its_switches_off_is_fsr(with_text: bool) -> None:
    for seed in range(5):
        image = make(9, 11, seed=seed, width=24)
        if not with_text:
            image = replace(image, relevance_N=None)
        for k in (10, 20, 60):
            fsr = choose("fsr", [image], [k])[0]
            other = choose("sppruner", [image], [k], **AS_FSR)[0]
            assert other.index_K.equal(fsr.index_K)
            assert other.focus_K.equal(fsr.focus_K)
            torch.testing.assert_close(other.replace_KD, fsr.replace_KD)


def test_a_flat_importance_leaves_a_tenth_of_the_budget_to_the_scan() -> None:
    """The paper's rule by itself would exceed the budget with the focus."""
    image = replace(make(10, 10), relevance_N=None)
    image = replace(image, signals={ATTENTION: torch.linspace(1, 2, 100)})
    for k, focus in ((1, 1), (2, 1), (10, 9), (11, 9), (40, 36)):
        assert int(choose("fsr", [image], [k])[0].focus_K.sum()) == focus


def test_constant_relevance_selects_by_saliency_only() -> None:
    image = make(8, 8)
    textless = replace(image, relevance_N=None)
    constant = replace(image, relevance_N=torch.full((64,), 0.3))
    one, other = choose("fsr", [textless, constant], [12, 12])
    assert one.index_K.equal(other.index_K)
    assert not one.index_K.equal(choose("fsr", [image], [12])[0].index_K)


@pytest.mark.parametrize("method", ["fsr", "sppruner"])
def test_a_merged_token_is_the_weighted_mean_even_with_tiny_weights(method: str) -> None:
    """Real importance has a median of about 1e-6, because relevance is cubed. Here nearly
    all of it is between 1e-8 and 1e-3, and a merged token is exact to 1e-4 of its norm."""
    image = make(12, 12, seed=4, width=48)
    generator = torch.Generator().manual_seed(4)
    small = 10 ** (-1 - 1.5 * torch.rand(image.count, generator=generator))
    small[0], small[1] = 1.0, 0.0
    image = replace(image, relevance_N=small, signals={ATTENTION: small.flip(0)})
    options = AS_FSR if method == "sppruner" else {}
    chosen = choose(method, [image], [40], **options)[0]
    _, kept, merged = reference(image, 40, FSRSelector())
    assert chosen.index_K.tolist() == kept
    off = np.linalg.norm(chosen.replace_KD.numpy() - merged[kept], axis=1)
    assert (off / np.linalg.norm(merged[kept], axis=1)).max() < 1e-4
