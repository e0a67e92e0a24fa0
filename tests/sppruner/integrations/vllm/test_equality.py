"""vLLM with the plugin answers as the library's own engine does: texts, prompt lengths, kept tokens
and modelled cost, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sppruner.engine import SamplingParams, open_engine
from sppruner.spec import DENSE, Budget, Positions, PruneSpec
from sppruner.tiny.questions import CAPTION_PROMPT
from tests.sppruner.integrations.vllm.requests import SPECS, facts, questions

SCENES = 32
MODELS = ["tiny-llava", "tiny-qwen"]


def name(spec: PruneSpec) -> str:
    return f"{spec.method}-{spec.budget.ratio}-{spec.positions}"


def on(positions: Positions) -> list[PruneSpec]:
    return [spec if spec.is_dense else replace(spec, positions=positions) for spec in SPECS]


@pytest.mark.parametrize(
    ("model", "positions"),
    [("tiny-llava", "keep"), ("tiny-llava", "renumber"), ("tiny-qwen", "keep")],
)
def test_answers_equal_those_of_the_engine(
    model: str, positions: Positions, open_vllm: Callable[..., Any]
) -> None:
    ours, theirs = open_engine(model, dtype="float32"), open_vllm(model)
    for spec in on(positions):
        requests = questions(SCENES, spec)
        expected, found = ours.run(requests), theirs.run(requests)
        assert not [r.error_message for r in (*expected, *found) if r.error_code], name(spec)
        different = [
            (a, b) for a, b in zip(map(facts, expected), map(facts, found), strict=True) if a != b
        ]
        assert not different, f"{name(spec)}: {len(different)} of {SCENES}, {different[0]}"


@pytest.mark.parametrize("model", MODELS)
def test_a_mixed_batch_answers_as_each_request_alone(
    model: str, open_vllm: Callable[..., Any]
) -> None:
    """Prompts are prefilled in chunks of 128 tokens, so that most are cut."""
    engine = open_vllm(model, max_num_batched_tokens=128, enable_prefix_caching=False)
    requests = [
        replace(request, spec=SPECS[number % len(SPECS)])
        for number, request in enumerate(questions(SCENES))
    ]
    together = engine.run(requests)
    for request, result in zip(requests, together, strict=True):
        assert facts(engine.run([request])[0]) == facts(result), request.spec


def test_positions_of_both_kinds_share_a_batch(open_vllm: Callable[..., Any]) -> None:
    """And differ in some answers, or the test would see nothing."""
    engine = open_vllm("tiny-llava")
    captions = [
        replace(request, prompt=CAPTION_PROMPT, generation=SamplingParams(max_new_tokens=24))
        for request in questions(SCENES)
    ]
    spec = PruneSpec(method="sppruner", budget=Budget(ratio=0.111))
    kept = [replace(request, spec=replace(spec, positions="keep")) for request in captions]
    moved = [replace(request, spec=replace(spec, positions="renumber")) for request in captions]
    mixed = engine.run([r for pair in zip(kept, moved, strict=True) for r in pair])
    engine.clear_caches()
    assert [facts(r) for r in mixed[::2]] == [facts(r) for r in engine.run(kept)]
    engine.clear_caches()
    assert [facts(r) for r in mixed[1::2]] == [facts(r) for r in engine.run(moved)]
    assert [r.text for r in mixed[::2]] != [r.text for r in mixed[1::2]]


@pytest.mark.parametrize("model", MODELS)
def test_several_images_and_text_only(model: str, open_vllm: Callable[..., Any]) -> None:
    ours, theirs = open_engine(model, dtype="float32"), open_vllm(model)
    single = questions(8)
    requests = [
        replace(one, images=one.images + two.images, spec=spec)
        for spec in (DENSE, SPECS[1])
        for one, two in zip(single[::2], single[1::2], strict=True)
    ]
    requests += [replace(request, images=()) for request in single]
    expected, found = ours.run(requests), theirs.run(requests)
    assert [facts(result) for result in found] == [facts(result) for result in expected]
