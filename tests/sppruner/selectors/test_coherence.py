"""SPpruner-R with coherence (mu above 0): focus spreads to similar neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sppruner.selectors.sppruner import SPprunerSelector
from sppruner.signals import ATTENTION
from tests.sppruner.selectors.images import choose, make
from tests.sppruner.selectors.test_sppruner import PLAIN, reference


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (1, 7), (5, 1)])
@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_selection_with_coherence_equals_the_plain_reference(
    grid: tuple[int, int], mu: float
) -> None:
    method = SPprunerSelector(mu=mu)
    for seed in (1, 2):
        image = make(*grid, seed=seed)
        k = max(1, image.count // 3)
        chosen = method.select([image], [k])[0]
        focus, context, merged = reference(image, k, method)
        kept = sorted(focus + context)
        assert chosen.index_K.tolist() == kept
        assert chosen.replace_KD is not None
        np.testing.assert_allclose(chosen.replace_KD.numpy(), merged[kept], atol=1e-4)


def test_salient_neighbours_raise_a_token_only_if_they_are_similar() -> None:
    """A salient block of 2 × 2, seen by the encoder as one thing, on a background of another: the
    token beside the block that looks like it comes next, its mirror image does not."""
    image = make(6, 6)
    thing, background = torch.eye(40)[:2]
    states = background.repeat(36, 1)
    attention = torch.full((36,), 0.1)
    block = [14, 15, 20, 21]
    states[[*block, 13]] = thing
    attention[block] = 1.0
    image = replace(image, hidden_NV=states, signals={ATTENTION: attention}, relevance_N=None)
    only = PLAIN | {"focus_min": 1.0, "focus_max": 1.0}
    with_coherence = choose("sppruner", [image], [5], **(only | {"mu": 0.5}))[0]
    assert with_coherence.index_K.tolist() == sorted([*block, 13])
    # Without it all of the background is alike, and the first of equals is taken.
    assert choose("sppruner", [image], [5], **only)[0].index_K.tolist() == [0, *block]
