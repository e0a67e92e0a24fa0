"""On every family, pruning inside the decoder equals masking layer by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sppruner import Budget, PruneSpec
from sppruner.pruner import Prepared
from sppruner.spec import DENSE
from sppruner.stages import StageDriver, staged_static_cache
from tests.sppruner.families import FAMILIES, pruner_of
from tests.sppruner.families.rows import one_row
from tests.sppruner.stages.reference import halving, hidden, recomputed

NEW = 6
MIXED = [1, 2, 0]  # one image, two images, text only
DENSE_INPUT = PruneSpec(method="grid", budget=Budget(ratio=1.0))
HALF_INPUT = PruneSpec(method="grid", budget=Budget(ratio=0.5))
TWO_STEPS = PruneSpec(
    method="sppruner",
    budget=Budget(ratio=0.4),
    options={"mode": "pre+mid", "relevance": "none"},
)


def settings(family: str, **extra: Any) -> dict[str, Any]:
    # EOS is suppressed: a finished row is padded and would compare equal for the wrong reason.
    return {
        "max_new_tokens": NEW,
        "do_sample": False,
        "suppress_tokens": [2, FAMILIES[family].image_id],
        "return_dict_in_generate": True,
        "output_logits": True,
    } | extra


def stage_layers(family: str, count: int) -> list[int]:
    can = pruner_of(family).adapter.capabilities
    assert can.first_prunable_layer is not None
    layers = list(range(can.first_prunable_layer, can.decoder_layers))[:count]
    if len(layers) < count:
        pytest.skip(f"the tiny {family} has room for {len(layers)} stages")
    return layers


def staged(
    family: str, attention: str, spec: PruneSpec, stages: int, images: list[int], **plan: Any
) -> Prepared:
    """A batch pruned before the decoder by `spec` and to be halved at each stage with the options
    `plan`; new, since `generate` consumes it."""
    pruner = pruner_of(family, attention)
    prepared = pruner.prepare(FAMILIES[family].batch(images), spec)
    visual_BL = pruner.adapter.placeholders(prepared.inputs["input_ids"])
    layers = stage_layers(family, stages)
    return replace(prepared, stages=halving(prepared, visual_BL, layers, **plan))


def drive(family: str, prepared: Prepared, **extra: Any) -> Any:
    pruner = pruner_of(family)
    assert prepared.stages is not None
    with StageDriver(pruner.adapter, prepared.stages):
        return pruner.model.generate(**prepared.inputs, **settings(family, **extra))


def logits(output: Any) -> Tensor:
    return torch.stack(output.logits, dim=1)


def new_tokens(output: Any) -> Tensor:
    return output.sequences[:, -NEW:]


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=5e-5, rtol=0)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("spec", [DENSE_INPUT, HALF_INPUT], ids=["all", "pruned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_equals_the_masked_recomputation(
    family: str, spec: PruneSpec, stages: int
) -> None:
    output = drive(family, staged(family, "sdpa", spec, stages, MIXED))
    eager = pruner_of(family, "eager")
    expected_BTV = recomputed(
        eager.model,
        eager.adapter.language_model(),
        staged(family, "eager", spec, stages, MIXED),
        new_tokens(output),
    )
    assert_close(logits(output), expected_BTV)
    suppressed = settings(family)["suppress_tokens"]
    expected_BTV[:, :, suppressed] = float("-inf")
    assert torch.equal(new_tokens(output), expected_BTV.argmax(dim=-1))


PLANS: dict[str, dict[str, Any]] = {
    "stage scores": {"stage_scored": [True, True, True]},
    "stage scores of one row": {"stage_scored": [False, True, False]},
    "renumbered": {"renumber": True},
    "stage scores, renumbered": {"stage_scored": [True, True, True], "renumber": True},
}


def plan_of(family: str, name: str) -> tuple[dict[str, Any], PruneSpec]:
    """A plan, and what prunes before the decoder."""
    plan = PLANS[name]
    if not plan.get("renumber"):
        return plan, HALF_INPUT
    if "renumber" not in pruner_of(family).adapter.capabilities.positions:
        pytest.skip("positions of M-RoPE cannot be renumbered")
    return plan, replace(HALF_INPUT, positions="renumber")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_plans_equal_the_masked_recomputation(family: str, name: str) -> None:
    plan, spec = plan_of(family, name)
    output = drive(family, staged(family, "sdpa", spec, 2, MIXED, **plan))
    eager = pruner_of(family, "eager")
    expected_BTV = recomputed(
        eager.model,
        eager.adapter.language_model(),
        staged(family, "eager", spec, 2, MIXED, **plan),
        new_tokens(output),
    )
    assert_close(logits(output), expected_BTV)
    plain = drive(family, staged(family, "sdpa", spec, 2, MIXED))
    assert not torch.allclose(logits(output), logits(plain), atol=1e-3), "the plan has no effect"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_static_caches_under_other_plans(family: str, name: str) -> None:
    plan, spec = plan_of(family, name)
    eager = pruner_of(family, "eager")
    beams = drive(family, staged(family, "sdpa", spec, 2, MIXED, **plan), num_beams=3)
    prepared = staged(family, "eager", spec, 2, MIXED, **plan)
    with hidden(eager.adapter.language_model(), prepared):
        expected = eager.model.generate(**prepared.inputs, **settings(family, num_beams=3))
    assert torch.equal(new_tokens(beams), new_tokens(expected))

    growing = drive(family, staged(family, "sdpa", spec, 2, MIXED, **plan))
    static = drive(
        family,
        staged(family, "sdpa", spec, 2, MIXED, **plan),
        cache_implementation="static",
    )
    assert torch.equal(static.sequences, growing.sequences)
    assert_close(logits(static), logits(growing))


@pytest.mark.parametrize(
    "extra",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["beams", "sampling"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_samples_equal_those_of_a_full_cache_under_masks(
    family: str, extra: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    output = drive(family, staged(family, "sdpa", HALF_INPUT, 2, MIXED), **extra)
    eager = pruner_of(family, "eager")
    prepared = staged(family, "eager", HALF_INPUT, 2, MIXED)
    torch.manual_seed(3)
    with hidden(eager.adapter.language_model(), prepared):
        expected = eager.model.generate(**prepared.inputs, **settings(family, **extra))
    assert torch.equal(new_tokens(output), new_tokens(expected))


@pytest.mark.parametrize("staged_lengths", [False, True], ids=["one length", "staged lengths"])
@pytest.mark.parametrize("family", FAMILIES)
def test_static_caches_equal_a_growing_one(family: str, staged_lengths: bool) -> None:
    pruner = pruner_of(family)
    spec = PruneSpec(
        method="fastv",
        budget=Budget(ratio=0.4),
        options={"layer": stage_layers(family, 1)[0]},
    )
    growing = drive(family, pruner.prepare(FAMILIES[family].batch(MIXED), spec))
    prepared = pruner.prepare(FAMILIES[family].batch(MIXED), spec)
    if staged_lengths:
        cache = staged_static_cache(pruner.model.config, prepared.reports, max_new_tokens=NEW)
        static = drive(family, prepared, past_key_values=cache)
        held = [layer.keys.shape[2] for layer in growing.past_key_values.layers]
        assert [layer.keys.shape[2] for layer in cache.layers] == held
        assert len(set(held)) == 2
    else:
        static = drive(family, prepared, cache_implementation="static")
    assert torch.equal(static.sequences, growing.sequences)
    assert_close(logits(static), logits(growing))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_batch_of_mixed_methods_equals_a_batch_of_one(family: str) -> None:
    pruner = pruner_of(family)
    inputs = FAMILIES[family].batch([1, 2, 1, 1, 0, 1, 2])
    layer, later = stage_layers(family, 2)
    fastv = PruneSpec(method="fastv", budget=Budget(ratio=0.3), options={"layer": layer})
    nothing = PruneSpec(method="fastv", budget=Budget(tokens=0), options={"layer": later})
    pyramid = PruneSpec(
        method="pyramiddrop", budget=Budget(tokens=2), options={"layers": str(later)}
    )
    specs = [DENSE, fastv, HALF_INPUT, pyramid, fastv, nothing, TWO_STEPS]
    stages = pruner.prepare(inputs, specs).stages
    assert stages is not None
    assert stages.stage_scored[later] == [False, False, False, True, False, False, False]
    together = pruner.generate(inputs, specs, **settings(family))
    for row, spec in enumerate(specs):
        single = pruner.generate(one_row(pruner.adapter, inputs, row), spec, **settings(family))
        assert torch.equal(single.tokens_BT[0], together.tokens_BT[row])
        assert_close(logits(single.output)[0], logits(together.output)[row])
        assert single.reports[0] == together.reports[row]


@pytest.mark.parametrize("method", ["fastv", "pre+mid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_of_the_cache_has_the_reported_length(family: str, method: str) -> None:
    options = {"layer": stage_layers(family, 1)[0]}
    fastv = PruneSpec(method="fastv", budget=Budget(ratio=0.3), options=options)
    spec = TWO_STEPS if method == "pre+mid" else fastv
    for images in ([1], [1, 2, 0]):
        inputs = FAMILIES[family].batch(images)
        generated = pruner_of(family).generate(inputs, spec, **settings(family))
        held = [layer.keys.shape[2] for layer in generated.output.past_key_values.layers]
        reports = generated.reports
        longest = [max(tokens) for tokens in zip(*(r.layer_tokens for r in reports), strict=True)]
        assert held == [tokens + NEW - 1 for tokens in longest]
        assert held[-1] < held[0]
        for report in reports:
            text = report.prompt_tokens_dense - report.visual_tokens
            visual = [tokens - text for tokens in report.layer_tokens]
            assert report.prompt_tokens == report.layer_tokens[0]
            counted = sum(visual) / len(visual) if method == "pre+mid" else visual[-1]
            assert report.visual_tokens_kept == counted
