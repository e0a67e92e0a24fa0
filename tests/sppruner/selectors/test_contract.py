"""Methods do what they declare: their signals, their text, how many tokens enter the decoder.

Adapters compute only the declared signals, and engines size KV caches by the declared bounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppruner.adapters import capabilities
from sppruner.errors import MissingSignal, SpecError
from sppruner.selectors import Selector, available, selector_for
from sppruner.signals import ATTENTION, CLS_ATTENTION, CONTENT_SEED, KEYS, RECEIVED_ATTENTION
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.families.llava import build
from tests.sppruner.selectors.images import make

CAN = capabilities(build().config)
STAGED: list[tuple[str, dict[str, Any]]] = [
    ("fastv", {}),
    ("pyramiddrop", {}),
    ("sppruner", {"mode": "pre+mid"}),
]
METHODS: list[tuple[str, dict[str, Any]]] = [
    (method, {}) for method in available() if method != "none"
]


def selector(method: str, **options: Any) -> Selector:
    chosen = selector_for(PruneSpec(method=method, options=options))
    assert chosen is not None
    return chosen


@pytest.mark.parametrize(
    ("method", "options", "signals"),
    [
        ("random", {}, {CONTENT_SEED}),
        ("grid", {}, set()),
        ("pool", {}, set()),
        ("divprune", {}, set()),
        ("cdpruner", {}, set()),
        ("topk", {}, {ATTENTION}),
        ("topk", {"saliency": "cls"}, {CLS_ATTENTION}),
        ("topk", {"saliency": "received"}, {RECEIVED_ATTENTION}),
        ("topk", {"saliency": "feature"}, set()),
        ("sppruner", {}, {ATTENTION}),
        ("fsr", {}, {ATTENTION}),
        ("vispruner", {}, {ATTENTION}),
        ("visionzip", {}, {ATTENTION, KEYS}),
        ("visionzip", {"saliency": "feature"}, {KEYS}),
        ("prunesid", {}, {ATTENTION}),
        ("prunesid", {"score": "loading"}, set()),
        ("fastv", {}, set()),
    ],
)
def test_a_method_reads_the_signals_it_declares_and_no_other(
    method: str, options: dict[str, Any], signals: set[str]
) -> None:
    chosen = selector(method, **options)
    assert chosen.signals == signals
    image = make(6, 6)
    given = {name: image.signals[name] for name in signals}
    whole = chosen.select([image], [9])[0]
    assert chosen.select([replace(image, signals=given)], [9])[0].index_K.equal(whole.index_K)
    for missing in signals:
        without = {name: value for name, value in given.items() if name != missing}
        with pytest.raises(KeyError, match=missing):
            chosen.select([replace(image, signals=without)], [9])


@pytest.mark.parametrize("method", ["sppruner", "fsr", "cdpruner"])
def test_the_options_set_source_and_pooling_of_relevance(method: str) -> None:
    default = selector(method)
    assert (default.relevance_source, default.relevance_pooling) == ("embed", "mean")
    clip = selector(method, relevance="clip", relevance_pool="top3")
    assert (clip.relevance_source, clip.relevance_pooling) == ("clip", "top3")


def test_a_method_without_text_uses_no_relevance() -> None:
    assert selector("grid").relevance_source == "none"
    assert selector("grid").relevance_pooling == "mean"


sizes = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@pytest.mark.parametrize(("method", "options"), [*METHODS, STAGED[-1]])
@given(size=sizes, layers=st.integers(2, 80))
def test_the_tokens_that_enter_a_decoder_are_within_the_declared_bounds(
    method: str, options: dict[str, Any], size: tuple[int, int], layers: int
) -> None:
    n, k = size
    chosen = selector(method, **options)
    low, high = chosen.decoder_entry_bounds(n, k)
    assert 0 <= low <= chosen.schedule(n, k, layers).before <= high <= n


@pytest.mark.parametrize(
    ("method", "options", "bounds"),
    [
        ("grid", {}, (64, 64)),
        ("sppruner", {}, (64, 64)),
        ("sppruner", {"mode": "pre+mid"}, (64, 96)),
        ("fastv", {}, (576, 576)),
        ("pyramiddrop", {}, (576, 576)),
    ],
)
def test_bounds_are_no_wider_than_the_method_needs(
    method: str, options: dict[str, Any], bounds: tuple[int, int]
) -> None:
    """The KV cache reserves their upper bound."""
    assert selector(method, **options).decoder_entry_bounds(576, 64) == bounds


def test_the_entry_bounds_do_not_exceed_the_tokens_of_the_image() -> None:
    assert selector("sppruner", mode="pre+mid").decoder_entry_bounds(100, 80) == (80, 100)


@pytest.mark.parametrize(("method", "options"), [*METHODS, *STAGED])
def test_a_method_is_staged_exactly_if_it_drops_tokens_inside_the_decoder(
    method: str, options: dict[str, Any]
) -> None:
    chosen = selector(method, **options)
    assert chosen.staged == bool(chosen.schedule(576, 64, 32).stages)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_a_method_that_only_prunes_inside_the_decoder_keeps_every_token_before_it(
    method: str,
) -> None:
    images = [make(4, 4, seed=0), make(4, 4, seed=1)]
    for image, chosen in zip(images, selector(method).select(images, [3, 9]), strict=True):
        assert chosen.index_K.equal(torch.arange(image.count))
        assert chosen.replace_KD is None
        assert chosen.replace_KV is None


@pytest.mark.parametrize(("method", "options"), STAGED)
def test_a_decoder_without_stages_is_refused_with_an_alternative(
    method: str, options: dict[str, Any]
) -> None:
    can = replace(CAN, first_prunable_layer=None)
    with pytest.raises(MissingSignal, match=r"prunes inside the decoder.*such as 'sppruner'"):
        selector(method, **options).check(Budget(ratio=0.5), can)


def test_a_method_in_front_of_the_decoder_runs_on_one_without_stages() -> None:
    selector("sppruner").check(Budget(ratio=0.5), replace(CAN, first_prunable_layer=None))


def test_only_methods_that_measure_an_image_take_a_budget_with_spread() -> None:
    spread = Budget(ratio=0.5, spread=0.2)
    selector("prunesid").check(spread, CAN)
    for method in ("grid", "sppruner", "fastv"):
        with pytest.raises(SpecError, match=rf"'{method}' does not measure.*such as 'prunesid'"):
            selector(method).check(spread, CAN)
        with pytest.raises(SpecError, match=f"'{method}' does not measure"):
            selector(method).information([make(4, 4)])


def test_grid_refuses_a_plane_with_holes() -> None:
    """Its cells are positions on a rectangle: with a missing token it would silently keep too
    few."""
    image = make(4, 4)
    holes = replace(
        image,
        features_ND=image.features_ND[1:],
        hidden_NV=None,
        coords_N2=image.coords_N2[1:],
    )
    with pytest.raises(SpecError, match="fill a rectangle"):
        selector("grid").select([holes], [5])


def test_an_average_budget_of_fastv_pays_for_the_layers_before_its_stage() -> None:
    """192 of 576 tokens on average over 32 layers: 2 layers see 576, so 30 see 166.4."""
    chosen = selector("fastv", count="average")
    assert chosen.schedule(576, 192, 32).stages == ((2, 166),)
    assert chosen.schedule(576, 36, 32).stages == ((2, 0),)
