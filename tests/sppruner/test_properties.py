"""Whatever is asked of whatever family: what the packed prompt must always be."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sppruner import Budget, Pruner, PruneSpec
from sppruner.spec import DENSE
from tests.sppruner.families import FAMILIES

# These need no text and leave the features alone, so that they can be compared.
PLAIN: dict[str, dict[str, Any]] = {
    "grid": {},
    "random": {"seed": 3},
    "topk": {},
    "sppruner": {"relevance": "none", "kappa": 0.0},
}

budgets = st.one_of(
    st.builds(
        Budget,
        ratio=st.floats(0.01, 1.0),
        min_keep=st.integers(0, 3),
        scope=st.sampled_from(["image", "prompt"]),
    ),
    st.builds(Budget, tokens=st.integers(0, 40), scope=st.sampled_from(["image", "prompt"])),
)
specs = st.one_of(
    st.just(DENSE),
    st.builds(
        lambda method, budget: PruneSpec(method=method, budget=budget, options=PLAIN[method]),
        st.sampled_from(sorted(PLAIN)),
        budgets,
    ),
)
rows = st.lists(st.tuples(st.integers(0, 2), specs), min_size=1, max_size=3)


@functools.cache
def pruner_of(name: str) -> Pruner:
    return Pruner(FAMILIES[name].build())


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis_settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows)
def test_a_packed_prompt_holds_its_text_and_its_budget_where_they_were(
    family: str, asked: list[tuple[int, PruneSpec]]
) -> None:
    pruner = pruner_of(family)
    images, per_row = [count for count, _ in asked], [spec for _, spec in asked]
    inputs = FAMILIES[family].batch(images)
    before = {name: value.clone() for name, value in inputs.items()}
    prepared = pruner.prepare(inputs, per_row)
    assert all(torch.equal(inputs[name], value) for name, value in before.items()), "mutated"

    ids_BL, mask_BL = prepared.inputs["input_ids"], prepared.inputs["attention_mask"].bool()
    image_id = FAMILIES[family].image_id
    steps = mask_BL[:, 1:].int() - mask_BL[:, :-1].int()
    assert (steps >= 0).all(), "padding on the left only"
    assert mask_BL.all(dim=0).any(), "no longer than its longest row"
    shapes = pruner.adapter.shapes(inputs)
    full_RBS = pruner.adapter.positions(inputs)
    for row, spec in enumerate(per_row):
        old = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        new = ids_BL[row][mask_BL[row]]
        assert torch.equal(new[new != image_id], old[old != image_id]), "text is never dropped"

        sizes = [shape.tokens for at, shape in shapes if at == row]
        report = prepared.reports[row]
        due = sum(sizes) if spec.is_dense else sum(spec.budget.per_image(sizes))
        assert int((new == image_id).sum()) == report.visual_tokens_kept == due
        assert report.visual_tokens == sum(sizes) == int((old == image_id).sum())
        assert report.prompt_tokens == len(new)
        assert set(report.layer_tokens) == {len(new)}

        if "position_ids" not in prepared.inputs:
            continue  # nothing was packed: a batch without images
        kept = prepared.inputs["position_ids"]
        if kept.dim() == 2:
            places = kept[row][mask_BL[row]].tolist()
            assert places == sorted(set(places)), "kept positions in order"
            assert set(places) <= set(full_RBS[0, row].tolist()), "kept positions are the originals"
        else:
            assert kept[0, row][mask_BL[row]].tolist() == list(range(len(new))), "M-RoPE text row"
            old_planes = full_RBS[1:, row][:, inputs["attention_mask"][row].bool()].T.tolist()
            new_planes = kept[1:, row][:, mask_BL[row]].T.tolist()
            assert _is_subsequence(new_planes, old_planes), "kept positions are the originals"


def _is_subsequence(short: list[Any], long: list[Any]) -> bool:
    rest = iter(long)
    return all(any(one == other for other in rest) for one in short)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_calls_in_a_row_are_equal_and_encoder_outputs_are_not_shared(family: str) -> None:
    """Beam search rewrites the packed output in place: the next call must not see it."""
    pruner = pruner_of(family)
    inputs = FAMILIES[family].batch([1, 2])
    spec = PruneSpec(method="topk", budget=Budget(ratio=0.4))
    kwargs: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "suppress_tokens": [2, FAMILIES[family].image_id],
    }
    first = pruner.generate(inputs, spec, **kwargs)
    pruner.generate(inputs, spec, num_beams=2, **kwargs)
    again = pruner.generate(inputs, spec, **kwargs)
    assert torch.equal(first.tokens_BT, again.tokens_BT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_budget_never_costs_more(family: str) -> None:
    pruner = pruner_of(family)
    inputs = FAMILIES[family].batch([2])
    cost = pruner.adapter.cost()
    flops, held = [], []
    for ratio in (0.05, 0.2, 0.5, 0.8, 1.0):
        spec = PruneSpec(method="grid", budget=Budget(ratio=ratio))
        report = pruner.prepare(inputs, spec).reports[0]
        row = cost.row(
            images=report.image_shapes,
            layer_tokens=report.layer_tokens,
            prompt_tokens_dense=report.prompt_tokens_dense,
            new_tokens=4,
            pruner_flops=0,
        )
        flops.append(sum(row.flops.values()))
        held.append(row.kv_bytes)
    assert flops == sorted(flops)
    assert held == sorted(held)
    assert (flops[-1], held[-1]) == (sum(row.flops_dense.values()), row.kv_bytes_dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_restored_after_an_error_in_the_encoder(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = pruner_of(family)
    inputs = FAMILIES[family].batch([1])
    spec = PruneSpec(method="topk", budget=Budget(ratio=0.4))
    configs = [m.config for m in pruner.model.modules() if hasattr(m, "config")]
    before = [config._attn_implementation for config in configs]

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(pruner.model.model, "get_image_features", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        pruner.prepare(inputs, spec)
    assert [config._attn_implementation for config in configs] == before
