"""VisionZip equals a plain reference, in the encoder's space and in the projected one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sppruner.signals import ATTENTION, KEYS
from sppruner.types import VisualTokens
from tests.sppruner.selectors.images import Array, choose, doubled, make, unit


def reference(
    image: VisualTokens, states_NV: Array, dominant: int, contextual: int, average: bool
) -> tuple[list[int], Array]:
    attention = doubled(image.signals[ATTENTION])
    order = np.argsort(-attention, kind="stable").tolist()
    rest = sorted(order[dominant:])
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    keys = unit(doubled(image.signals[KEYS]))
    guests: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            guests[max(targets, key=lambda t: float(keys[i] @ keys[t]))].append(i)
    states = states_NV.copy()
    for target, joined in guests.items():
        if joined and average:
            states[target] = states_NV[[target, *joined]].mean(axis=0)
        elif joined:
            states[target] = states_NV[target] + states_NV[joined].mean(axis=0)
    kept = sorted(order[:dominant] + targets)
    return kept, states[kept]


@pytest.mark.parametrize(
    ("k", "contextual"), [(192, 30), (128, 20), (64, 10), (575, 90), (4, 1), (3, 0)]
)
@pytest.mark.parametrize("average", [False, True])
def test_splits_and_merging_are_those_of_the_published_code(
    k: int, contextual: int, average: bool
) -> None:
    image = make(24, 24, seed=k)
    chosen = choose("visionzip", [image], [k], average=average)[0]
    if contextual == 0:
        assert chosen.replace_KV is None
        assert chosen.index_K.equal(choose("topk", [image], [k])[0].index_K)
        return
    kept, states = reference(image, doubled(image.hidden_NV), k - contextual, contextual, average)
    assert chosen.index_K.tolist() == kept
    assert int(chosen.focus_K.sum()) == k - contextual
    np.testing.assert_allclose(chosen.replace_KV.numpy(), states, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"contextual": 0.6}, {"contextual": 1.0}])
def test_features_are_merged_where_the_projector_works_on_several_tokens_at_once(
    options: dict[str, Any],
) -> None:
    image = replace(make(7, 9), hidden_NV=None)
    k = 20
    contextual = round(options.get("contextual", 10 / 64) * k)
    kept, features = reference(image, doubled(image.features_ND), k - contextual, contextual, False)
    chosen = choose("visionzip", [image], [k], **options)[0]
    assert chosen.index_K.tolist() == kept
    np.testing.assert_allclose(chosen.replace_KD.numpy(), features, atol=1e-5)


def test_dominant_tokens_keep_their_states() -> None:
    image = make(8, 8)
    chosen = choose("visionzip", [image], [32])[0]
    assert image.hidden_NV is not None
    before = image.hidden_NV[chosen.index_K]
    assert chosen.replace_KV[chosen.focus_K].equal(before[chosen.focus_K])
    assert not chosen.replace_KV[~chosen.focus_K].equal(before[~chosen.focus_K])
