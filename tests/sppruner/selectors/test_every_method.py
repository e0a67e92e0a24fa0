"""Every method that prunes in front of the decoder keeps exactly its count of tokens for any image
and batch, and reports invalid options before the model runs."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sppruner.errors import SpecError, UnknownMethod
from sppruner.selectors import available, selector_for
from sppruner.spec import PruneSpec
from sppruner.types import Selection, VisualTokens
from tests.sppruner.selectors.images import choose, flat, make, same


def prunes_before(method: str) -> bool:
    selector = selector_for(PruneSpec(method=method))
    return selector is not None and not selector.schedule(100, 10, 32).stages


METHODS = [method for method in available() if prunes_before(method)]
# The variants of a method have the same properties.
VARIANTS: list[tuple[str, dict[str, Any]]] = [(method, {}) for method in METHODS]
VARIANTS += [
    ("cdpruner", {"split_halves": True, "theta": 0.5}),
    ("prunesid", {"center": "feature", "score": "loading", "tau_mode": "qwen", "quota": "size"}),
    ("topk", {"saliency": "feature"}),
    ("visionzip", {"contextual": 1.0, "average": True}),
    ("vispruner", {"important": 0.0}),
]


def valid(chosen: Selection, image: VisualTokens, k: int) -> None:
    index = chosen.index_K.tolist()
    assert len(index) == min(k, image.count)
    assert index == sorted(set(index))
    assert all(0 <= i < image.count for i in index)
    for new, old in (
        (chosen.replace_KD, image.features_ND),
        (chosen.replace_KV, image.hidden_NV),
    ):
        if new is not None:
            assert old is not None
            assert new.shape == (len(index), old.shape[1])
            assert new.dtype == old.dtype
            assert new.isfinite().all()


@pytest.mark.parametrize(("method", "options"), VARIANTS)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    share=st.floats(0, 1.2),
    constant=st.booleans(),
    textless=st.booleans(),
)
def test_exactly_k_sorted_unique_tokens_are_kept_of_any_grid(
    method: str,
    options: dict[str, Any],
    rows: int,
    columns: int,
    share: float,
    constant: bool,
    textless: bool,
) -> None:
    """Also for one row, one token, equal tokens, and without text."""
    image = make(rows, columns, seed=rows * 10 + columns)
    image = flat(image) if constant else image
    image = replace(image, relevance_N=None) if textless else image
    for k in {0, 1, round(share * image.count), image.count - 1, image.count, image.count + 3}:
        valid(choose(method, [image], [k], **options)[0], image, k)


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_a_plane_whose_projector_does_not_work_token_by_token_is_pruned_in_its_features(
    method: str, options: dict[str, Any]
) -> None:
    image = replace(make(5, 5), hidden_NV=None)
    chosen = choose(method, [image], [7], **options)[0]
    valid(chosen, image, 7)
    assert chosen.replace_KV is None


@pytest.mark.parametrize(("method", "options"), VARIANTS)
@given(data=st.data())
def test_a_selection_does_not_depend_on_batch_mates_or_their_order(
    method: str, options: dict[str, Any], data: st.DataObject
) -> None:
    grids = data.draw(
        st.lists(st.sampled_from([(6, 6), (4, 9), (3, 5), (1, 7)]), min_size=1, max_size=5)
    )
    images = [make(*grid, seed=i) for i, grid in enumerate(grids)]
    counts = [data.draw(st.integers(0, image.count)) for image in images]
    order = data.draw(st.permutations(range(len(images))))
    mixed = choose(method, [images[i] for i in order], [counts[i] for i in order], **options)
    for at, i in enumerate(order):
        single = choose(method, [images[i]], [counts[i]], **options)[0]
        assert single.index_K.equal(mixed[at].index_K)
        assert same(single, mixed[at])


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_images_split_over_several_calls_are_selected_as_in_one(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, counts = [make(4, 4, seed=i) for i in range(5)], [3, 15, 8, 1, 6]
    whole = choose(method, images, counts, **options)
    monkeypatch.setattr("sppruner.selectors.base._PAIRS", 2 * 16**2)
    for one, other in zip(whole, choose(method, images, counts, **options), strict=True):
        assert same(one, other)


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_the_same_values_in_bfloat16_and_float32_give_the_same_selection(
    method: str, options: dict[str, Any]
) -> None:
    exact = make(6, 6)
    assert exact.hidden_NV is not None
    half_ND, half_NV = exact.features_ND.bfloat16(), exact.hidden_NV.bfloat16()
    half = replace(exact, features_ND=half_ND, hidden_NV=half_NV)
    full = replace(exact, features_ND=half_ND.float(), hidden_NV=half_NV.float())
    narrow, wide = (
        choose(method, [half], [9], **options)[0],
        choose(method, [full], [9], **options)[0],
    )
    assert narrow.index_K.equal(wide.index_K)
    valid(narrow, half, 9)
    for low, high in (
        (narrow.replace_KD, wide.replace_KD),
        (narrow.replace_KV, wide.replace_KV),
    ):
        if low is not None:
            assert low.equal(high.bfloat16())


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_selecting_is_repeatable_and_does_not_change_the_image(
    method: str, options: dict[str, Any]
) -> None:
    image = make(6, 6)
    assert image.hidden_NV is not None
    assert image.relevance_N is not None
    held = [image.features_ND, image.hidden_NV, image.relevance_N, *image.signals.values()]
    before = [tensor.clone() for tensor in held]
    first, second = (choose(method, [image, image], [9, 35], **options) for _ in range(2))
    assert all(map(same, first, second))
    assert all(map(torch.equal, held, before))


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_option_or_a_value_of_another_type_is_one_clear_error(method: str) -> None:
    selector = selector_for(PruneSpec(method=method))
    assert selector is not None
    with pytest.raises(SpecError, match=f"method '{method}' has no option 'budget'; it has "):
        selector_for(PruneSpec(method=method, options={"budget": 3}))
    for field in fields(selector):
        value = 1 if isinstance(field.default, str) else "much"
        with pytest.raises(SpecError, match=re.escape(field.name)):
            selector_for(PruneSpec(method=method, options={field.name: value}))
        if isinstance(field.default, str):
            with pytest.raises(SpecError, match=f"{field.name}='nonsense'.*: use "):
                selector_for(PruneSpec(method=method, options={field.name: "nonsense"}))


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, 1e6, -1e6, 1e-6, 5e-324, 1e154, 1e200, 1e308]),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, 2, 10**6, -1]),
)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data(), rows=st.integers(1, 7), columns=st.integers(1, 7))
def test_any_numbers_as_options_are_refused_or_select(
    method: str, data: st.DataObject, rows: int, columns: int
) -> None:
    """Before the model runs, or never: what fails in the middle costs others their answers."""
    plain = selector_for(PruneSpec(method=method))
    assert plain is not None
    options: dict[str, Any] = {}
    for field in fields(plain):
        default: object = field.default
        if isinstance(default, int | float) and data.draw(st.booleans()):
            drawn = data.draw(NUMBERS)
            options[field.name] = 1.0 * drawn if isinstance(default, float) else drawn
    try:
        selector = selector_for(PruneSpec(method=method, options=options))
    except SpecError:
        return
    assert selector is not None
    image = make(rows, columns, seed=rows * 10 + columns)
    for k in (1, image.count // 2, image.count):
        valid(choose(method, [image], [k], **options)[0], image, k)


def test_the_error_for_an_unknown_method_lists_all_methods() -> None:
    with pytest.raises(UnknownMethod, match=", ".join(available())):
        selector_for(PruneSpec(method="gird"))


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        ("random", {"seed": True}), ("random", {"seed": -1}), ("random", {"seed": 2**16}),
        ("random", {"seed": 1.5}),
        ("sppruner", {"alpha": 0, "beta": 0}), ("sppruner", {"percentile": 1.5}),
        ("sppruner", {"sigma": 0.0}), ("sppruner", {"windows": -1}), ("sppruner", {"kappa": -0.5}),
        ("sppruner", {"redundancy": 1.1}), ("sppruner", {"focus_min": 0.7}),
        ("sppruner", {"mu": -0.1}), ("sppruner", {"windows": 2.0}),
        ("prunesid", {"usual_information": 0.0}), ("cdpruner", {"theta": 1.1}),
        ("fsr", {"rho": 1.5}), ("fsr", {"kappa": -1.0}), ("visionzip", {"contextual": 2.0}),
        ("vispruner", {"important": -0.1}),
        ("sppruner", {"restore_norm": 1}), ("sppruner", {"relevance_floor": -1}),
    ],
)  # fmt: skip
def test_invalid_values_fail_when_the_selector_is_built(method: str, bad: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="|".join(bad)):
        selector_for(PruneSpec(method=method, options=bad))
