"""Modelled FLOPs of selecting, against hand counts and against torch's counter.

A multiply-add counts as 2. n tokens have n (n + 1) / 2 pairs with the diagonal, so cosines of all
pairs of `width` features take n (n + 1) width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from sppruner.selectors import Selector, selector_for
from sppruner.spec import PruneSpec
from tests.sppruner.selectors.images import make

N, K, WIDTH = 64, 16, 16
COSINES = N * (N + 1) * WIDTH
KEY_WIDTH = 8


def selector(method: str, **options: Any) -> Selector:
    chosen = selector_for(PruneSpec(method=method, options=options))
    assert chosen is not None
    return chosen


def counted(method: str, **options: Any) -> int:
    """What torch counts: matrix products only. Below 129 tokens cosines are one full square."""
    image = replace(make(8, 8, width=WIDTH), hidden_NV=None)
    with FlopCounterMode(display=False) as counter:
        selector(method, **options).select([image], [K])
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("method", "options", "flops"),
    [
        ("random", {}, 0),
        ("grid", {}, 0),
        ("topk", {}, 0),
        ("fastv", {}, 0),
        ("pyramiddrop", {}, 0),
        ("divprune", {}, COSINES),
        ("vispruner", {}, COSINES),
        ("fsr", {}, COSINES),
        ("sppruner", {}, COSINES),
        # Eight neighbours of every token.
        ("sppruner", {"mu": 0.3}, COSINES + 8 * N * WIDTH),
        # The products of the states and of the centred states, and the eigenvectors.
        ("prunesid", {}, 2 * COSINES + 9 * N**3),
        ("cdpruner", {}, COSINES + K * K * N),
    ],
)
def test_modelled_flops_equal_a_hand_count(
    method: str, options: dict[str, Any], flops: int
) -> None:
    assert selector(method, **options).flops(N, K, WIDTH) == flops


@pytest.mark.parametrize("method", ["divprune", "vispruner", "fsr"])
def test_cosines_are_counted_as_half_of_the_square_that_torch_counts(method: str) -> None:
    square = counted(method, **({"kappa": 0.0} if method == "fsr" else {}))
    assert square == 2 * N * N * WIDTH
    assert selector(method).flops(N, K, WIDTH) == square * (N + 1) // (2 * N)


def test_cdpruners_cholesky_rows_are_what_torch_counts_to_one_row() -> None:
    rows = counted("cdpruner") - 2 * N * N * WIDTH
    modelled = selector("cdpruner").flops(N, K, WIDTH) - COSINES
    assert 0 <= modelled - rows <= K * N


def test_visionzips_merging_product_is_what_torch_counts_without_the_keys() -> None:
    """Torch also sees the product of the keys, which are narrower and not modelled."""
    merged = 3  # 10/64 of 16, rounded
    keys = 2 * (N - K) * merged * KEY_WIDTH
    assert selector("visionzip").flops(N, K, WIDTH) == counted("visionzip") - keys
    assert selector("visionzip", contextual=0.0).flops(N, K, WIDTH) == 0


def test_poolings_means_are_what_torch_counts_besides_the_sums() -> None:
    """On a square grid; the N additions of WIDTH values are no matrix product."""
    assert selector("pool").flops(N, K, WIDTH) == counted("pool") + N * WIDTH
