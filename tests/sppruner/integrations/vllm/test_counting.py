"""Budgets that depend on what the images show: they are counted first, in a pass of their own, and
the tower runs on each image once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sppruner.engine import Request, open_engine
from sppruner.integrations.vllm.wire import COUNTED, PRUNE
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.integrations.vllm.requests import SPECS, facts, questions

SPREAD = PruneSpec(method="prunesid", budget=Budget(ratio=0.222, spread=0.5))
SHARED = PruneSpec(method="sppruner", budget=Budget(ratio=0.222, scope="prompt"))
BOTH = PruneSpec(method="prunesid", budget=Budget(tokens=40, spread=0.4, scope="prompt"))


def pairs(requests: list[Request]) -> list[Request]:
    """Prompts of two images each; on Qwen, of two sizes."""
    found = []
    for first, second in zip(requests[::2], requests[1::2], strict=True):
        (image,) = second.images
        wide = image.resize((image.width * 2, image.height))
        found.append(replace(first, images=(*first.images, wide)))
    return found


@pytest.mark.parametrize("model", ["tiny-llava", "tiny-qwen"])
@pytest.mark.parametrize("spec", [SPREAD, SHARED, BOTH], ids=["spread", "prompt", "both"])
def test_answers_equal_those_of_the_engine(
    model: str, spec: PruneSpec, open_vllm: Callable[..., Any]
) -> None:
    ours, theirs = open_engine(model, dtype="float32"), open_vllm(model)
    requests = [*questions(16, spec), *pairs(questions(16, spec))]
    expected, found = ours.run(requests), theirs.run(requests)
    assert not [r.error_message for r in (*expected, *found) if r.error_code]
    if spec.budget.spread:
        assert len({result.visual_tokens_kept for result in expected[:16]}) > 3
    different = [
        (a, b) for a, b in zip(map(facts, expected), map(facts, found), strict=True) if a != b
    ]
    assert not different, f"{len(different)} of {len(requests)}, {different[0]}"


def test_the_tower_runs_once_and_time_adds_up(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava", enable_prefix_caching=False)
    (served,) = engine._llm.apply_model(lambda model: model)
    encoded: list[int] = []
    encode = served._encode

    def recording(inputs: Any, count: int, wanted: Any) -> Any:
        encoded.append(count)
        return encode(inputs, count, wanted)

    served._encode = recording
    before = engine.busy_seconds
    try:
        results = engine.run(questions(12, SPREAD))
    finally:
        del served._encode
    assert sum(encoded) == 12
    assert not served._ahead
    assert sum(r.seconds for r in results) == pytest.approx(engine.busy_seconds - before)
    assert all(r.cost is not None and not r.cost.flops_cached for r in results)


def test_many_are_counted_no_further_ahead_than_the_model_holds(
    open_vllm: Callable[..., Any],
) -> None:
    engine = open_vllm("tiny-llava", slots=2, enable_prefix_caching=False)
    (served,) = engine._llm.apply_model(lambda model: model)
    encode, encoded, held = served._encode, [], []

    def recording(inputs: Any, count: int, wanted: Any) -> Any:
        encoded.append(count)
        held.append(len(served._ahead))
        return encode(inputs, count, wanted)

    served._encode = recording
    try:
        results = engine.run(pairs(questions(60, SPREAD)))
    finally:
        del served._encode
    assert not [result.error_message for result in results if result.error_code]
    assert sum(encoded) == 60
    assert 10 < max(held) <= 16


def test_two_specs_on_one_image(open_vllm: Callable[..., Any]) -> None:
    """They read other signals of it, and are counted before either is embedded."""
    specs = [
        PruneSpec(method=method, budget=Budget(ratio=0.222, scope="prompt"))
        for method in ("visionzip", "divprune", "sppruner")
    ]
    (request,) = questions(1)
    requests = [replace(request, spec=spec, id=spec.method) for spec in specs]
    expected = open_engine("tiny-llava", dtype="float32").run(requests)
    found = open_vllm("tiny-llava").run(requests)
    assert [facts(result) for result in found] == [facts(result) for result in expected]


def test_a_tower_that_ran_to_count_was_no_cache(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava")
    requests = questions(4, SPREAD)
    engine.run(requests)
    for result in engine.run(requests):
        assert result.cost is not None
        assert not result.cost.flops_cached.get("vision")


def test_beside_others_and_cancelled_ones(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava")
    requests = [
        replace(request, spec=SPREAD if number % 2 else SPECS[number % len(SPECS)])
        for number, request in enumerate(questions(24))
    ]
    alone = [facts(engine.run([request])[0]) for request in requests]
    engine.clear_caches()
    tickets = [engine.submit(request) for request in requests]
    results: dict[int, Any] = {}
    for number in range(3, 24, 6):
        engine.step()
        assert engine.cancel(tickets[number])
    while engine.in_flight:
        engine.step()
        results |= {u.ticket: u.result for u in engine.poll() if u.result is not None}
    kept = [number for number in range(24) if number % 6 != 3]
    assert [facts(results[tickets[number]]) for number in kept] == [alone[n] for n in kept]


@pytest.mark.parametrize("counted", [5, [], [[3]], [["3", "a"]], [[3, 4]], [[3, "a"], [3, "b"]]])
def test_counts_that_are_none_are_refused(counted: Any, open_vllm: Callable[..., Any]) -> None:
    """By a client of plain vLLM, who has no use for them."""
    engine = open_vllm("tiny-llava")
    (request,) = questions(1, SPREAD)
    prompt = engine.prompt(replace(request, spec=SPREAD))
    prompt["mm_processor_kwargs"] |= {COUNTED: counted, PRUNE: SPREAD.to_dict()}
    with pytest.raises(ValueError, match="prune_counted"):
        engine._vllm.renderer.render_cmpl([prompt])
