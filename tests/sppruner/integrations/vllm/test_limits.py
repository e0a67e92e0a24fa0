"""Where memory is short: rows are preempted and prefilled again, and the tower is called in parts
that memory was planned for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sppruner.engine import open_engine
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.integrations.vllm.requests import facts, questions
from tests.sppruner.integrations.vllm.test_engine import free_blocks, long

# Prompts of 31 tokens: each row needs a second block of 32 as it begins to answer.
SPP = PruneSpec(method="sppruner", budget=Budget(tokens=20))


def test_preempted_rows_answer_as_each_alone(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm(
        "tiny-llava",
        block_size=32,
        num_gpu_blocks_override=12,
        max_model_len=256,
        enable_prefix_caching=False,
    )
    scheduler = engine._vllm.engine_core.engine_core.scheduler
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def counting(request: Any, *arguments: Any, **named: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *arguments, **named)

    scheduler._preempt_request = counting
    requests = long(questions(16, SPP), tokens=40)
    together = engine.run(requests)
    assert preempted, "memory was not short"
    scheduler._preempt_request = preempt
    for request, result in zip(requests, together, strict=True):
        assert facts(engine.run([request])[0]) == facts(result)
    assert free_blocks(engine) == 11


@pytest.mark.parametrize("model", ["tiny-llava", "tiny-qwen"])
def test_the_tower_is_never_called_with_more_than_was_planned(
    model: str, open_vllm: Callable[..., Any]
) -> None:
    """vLLM counts shortened images against the room of dense ones."""
    engine = open_vllm(model, slots=32, max_num_batched_tokens=512, enable_prefix_caching=False)
    (served,) = engine._llm.apply_model(lambda model: model)
    calls: list[int] = []
    embed = served._embed

    def recording(inputs: Any, asked: Any) -> Any:
        calls.append(sum(request.tokens for request in asked))
        return embed(inputs, asked)

    few = PruneSpec(method="sppruner", budget=Budget(tokens=8))
    requests = questions(24, few)
    expected = engine.run(requests)
    served._embed = recording
    engine.clear_caches()
    found = engine.run(requests)
    del served._embed
    assert [facts(result) for result in found] == [facts(result) for result in expected]
    assert max(calls) <= max(512, 2 * 144)
    assert len(calls) > 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_decoder_answers_as_the_library_s_engine(open_vllm: Callable[..., Any]) -> None:
    requests = questions(16, PruneSpec(method="sppruner", budget=Budget(ratio=0.222)))
    expected = open_engine("tiny-llava", dtype="float32").run(requests)
    engine = open_vllm("tiny-llava", enforce_eager=False)
    compilation = engine._vllm.vllm_config.compilation_config
    assert str(compilation.mode) != "CompilationMode.NONE", compilation.mode
    found = engine.run(requests)
    assert [facts(result) for result in found] == [facts(result) for result in expected]
