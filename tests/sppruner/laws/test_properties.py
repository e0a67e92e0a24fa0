"""Invariants of the packed prompt for every family and any spec."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList

from sppruner import Budget, Pruner, PruneSpec, signals
from sppruner.adapters import Encoded
from sppruner.spec import DENSE, Positions
from tests.sppruner.families import FAMILIES, pruner_of
from tests.sppruner.stages.test_driver import Fails

# These need no text and do not change the features, so that they can be compared.
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


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis_settings(max_examples=12, deadline=None)
@given(rows, st.sampled_from(["keep", "renumber"]))
def test_a_packed_prompt_holds_its_text_and_its_budget_at_their_positions(
    family: str, requests: list[tuple[int, PruneSpec]], policy: Positions
) -> None:
    pruner = pruner_of(family)
    if policy not in pruner.adapter.capabilities.positions:
        policy = "keep"
    images = [count for count, _ in requests]
    per_row = [s if s.is_dense else replace(s, positions=policy) for _, s in requests]
    # Without a spec that prunes there is nothing to renumber for.
    renumbered = policy == "renumber" and not all(spec.is_dense for spec in per_row)
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
        expected = sum(sizes) if spec.is_dense else sum(spec.budget.per_image(sizes))
        assert int((new == image_id).sum()) == report.visual_tokens_kept == expected
        assert report.visual_tokens == sum(sizes) == int((old == image_id).sum())
        assert report.prompt_tokens == len(new)
        assert set(report.layer_tokens) == {len(new)}

        if not any(images):
            continue  # nothing was packed, `generate` makes the positions as always
        kept = prepared.inputs["position_ids"]
        if kept.dim() == 2:
            places = kept[row][mask_BL[row]].tolist()
            if renumbered:
                assert places == list(range(len(new))), "no gaps"
                continue
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


TOPK = PruneSpec(method="topk", budget=Budget(ratio=0.4))
# Its merged tokens replace features.
MERGING = PruneSpec(method="visionzip", budget=Budget(ratio=0.4), options={"contextual": 0.5})


def answer(pruner: Pruner, family: str, images: list[int], spec: PruneSpec, **extra: Any) -> Tensor:
    """New tokens; the end token is suppressed, so that none is padding."""
    generated = pruner.generate(
        FAMILIES[family].batch(images),
        spec,
        max_new_tokens=3,
        do_sample=False,
        suppress_tokens=[2, FAMILIES[family].image_id],
        **extra,
    )
    return generated.tokens_BT


def call(pruner: Pruner, family: str, name: str) -> Tensor | None:
    """Runs one kind of call; None for a call that raises half-way."""
    layer = pruner.adapter.capabilities.first_prunable_layer
    staged = PruneSpec(method="fastv", budget=Budget(ratio=0.3), options={"layer": layer or 1})
    if name.startswith("error"):
        # In the forward of the prompt, or in a later one.
        failing = LogitsProcessorList([Fails(int(name[-1]))])
        with pytest.raises(ZeroDivisionError):
            answer(pruner, family, [1, 2], staged, logits_processor=failing)
        return None
    if name == "beams":
        return answer(pruner, family, [1, 2], TOPK, num_beams=2)
    images = {"dense": [2, 1], "text": [0, 0]}.get(name, [1, 2])
    specs = {"topk": TOPK, "merging": MERGING, "staged": staged, "text": TOPK}
    return answer(pruner, family, images, specs.get(name, DENSE))


CALLS = ["beams", "dense", "error at 1", "error at 2", "merging", "staged", "text", "topk"]


@functools.cache
def answer_of_a_fresh_model(family: str, name: str) -> Tensor | None:
    return call(Pruner(FAMILIES[family].build()), family, name)


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis_settings(max_examples=5, deadline=None)
@given(st.lists(st.sampled_from(CALLS), min_size=2, max_size=5))
def test_no_call_leaves_a_trace_in_the_next(family: str, names: list[str]) -> None:
    """No stored positions of the model, no hook, no attention function, no feature."""
    pruner = pruner_of(family)
    decoder = pruner.adapter.language_model()
    for name in names:
        found, expected = call(pruner, family, name), answer_of_a_fresh_model(family, name)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.equal(expected), f"{name} after {names}"
        assert not any(layer._forward_pre_hooks for layer in decoder.layers)
        assert not signals._active
        assert decoder.config._attn_implementation == "sdpa"


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of an encoder output, at any nesting."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (found for part in value.values() for found in tensors(part))
    elif isinstance(value, list | tuple):
        yield from (found for part in value for found in tensors(part))


def held(encoded: Encoded) -> list[Tensor]:
    parts: list[Any] = [dict(encoded.output)]
    for image in encoded.images:
        parts += [image.run_ND, image.places]
        for plane in image.planes:
            parts += [plane.features_ND, plane.hidden_NV, plane.coords_N2, plane.signals]
    return list(tensors(parts))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_images_encoded_once_serve_one_spec_after_the_other(family: str) -> None:
    """Beam search rewrites packed outputs, and merging replaces features; neither may change the
    encoded images."""
    pruner, inputs = pruner_of(family), FAMILIES[family].batch([1, 2])
    specs = [MERGING, TOPK, PruneSpec(method="grid"), MERGING]
    encoded = pruner.adapter.encode(inputs, pruner.signals(specs))
    before = [tensor.clone() for tensor in held(encoded)]
    settings: dict[str, Any] = {
        "max_new_tokens": 3,
        "num_beams": 2,
        "suppress_tokens": [2, FAMILIES[family].image_id],
    }
    for spec in specs:
        shared = pruner.run(pruner.prepare(inputs, spec, encoded=encoded), **settings)
        assert shared.tokens_BT.equal(pruner.generate(inputs, spec, **settings).tokens_BT)
    assert all(map(torch.equal, held(encoded), before))


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
