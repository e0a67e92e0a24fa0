"""The contract of `Engine`, of vLLM: priorities, cancelling, streams, sampling, stop strings, bad
requests, caches and time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sppruner.conversation import Turn
from sppruner.engine import Request, Result, SamplingParams, open_engine
from sppruner.errors import EngineError, InputError, SpecError
from sppruner.spec import DENSE, Budget, PruneSpec
from tests.sppruner.integrations.vllm.requests import facts, questions

SPP = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))


def long(requests: list[Request], tokens: int = 24) -> list[Request]:
    """Ask for captions of several tokens."""
    generation = SamplingParams(max_new_tokens=tokens)
    return [replace(r, prompt="describe the scene .", generation=generation) for r in requests]


def finish(engine: Any) -> dict[int, Result]:
    results: dict[int, Result] = {}
    while engine.in_flight:
        engine.step()
        results |= {u.ticket: u.result for u in engine.poll() if u.result is not None}
    results |= {u.ticket: u.result for u in engine.poll() if u.result is not None}
    return results


def test_urgent_requests_overtake_those_that_wait(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava", slots=2)
    requests = long(questions(8, SPP))
    tickets = [engine.submit(request) for request in requests]
    urgent = engine.submit(replace(requests[0], id="urgent", priority=-1))
    order = []
    while engine.in_flight:
        engine.step()
        order += [u.ticket for u in engine.poll() if u.result is not None]
    assert order.index(urgent) < len(tickets) // 2


def test_a_request_is_cancelled_in_every_state(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava", slots=2)
    requests = long(questions(8, SPP))
    free = free_blocks(engine)
    tickets = [engine.submit(request) for request in requests]
    assert engine.cancel(tickets[-1])  # while it is rendered
    for _ in range(50):
        engine.step()
        if len(engine._running) == len(tickets) - 1:
            break
    assert engine.cancel(tickets[-2])  # while it waits
    assert engine.cancel(tickets[0])  # while it runs
    results = finish(engine)
    assert set(results) == set(tickets[1:-2])
    assert not engine.cancel(tickets[0])
    assert not engine.cancel(tickets[1])
    engine.clear_caches()
    assert free_blocks(engine) == free


def free_blocks(engine: Any) -> int:
    pool = engine._vllm.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return int(pool.get_num_free_blocks())


@pytest.mark.parametrize("spec", [DENSE, SPP])
def test_conversations_and_answers_cut_to_the_context_are_those_of_our_engine(
    open_vllm: Callable[..., Any], spec: PruneSpec
) -> None:
    one, other = questions(2, spec)
    talk = replace(
        one,
        id="talk",
        images=(*one.images, *other.images),
        turns=(
            Turn("system", ("be brief </s>",)),
            Turn("user", ("first", None, one.prompt)),
            Turn("assistant", ("red",)),
            Turn("user", (None, other.prompt)),
        ),
    )
    open_ended = SamplingParams(max_new_tokens=10_000)
    fitted = replace(one, id="fitted", fit_context=True, generation=open_ended)
    ours = open_engine("tiny-llava")
    theirs = open_vllm("tiny-llava")
    asked = [talk, fitted]
    assert [*map(facts, theirs.run(asked))] == [*map(facts, ours.run(asked))]
    assert theirs.run([replace(fitted, fit_context=False)])[0].error_code == "prompt_invalid"


def test_probabilities_of_tokens_are_those_of_our_engine(open_vllm: Callable[..., Any]) -> None:
    asked = [replace(request, logprobs=4) for request in long(questions(3, SPP), 8)]
    ours, theirs = open_engine("tiny-llava").run(asked), open_vllm("tiny-llava").run(asked)
    for one, other in zip(ours, theirs, strict=True):
        assert [t.token for t in one.logprobs] == [t.token for t in other.logprobs]
        for token, twin in zip(one.logprobs, other.logprobs, strict=True):
            assert token.logprob == pytest.approx(twin.logprob, abs=1e-3)
            assert [t.token for t in token.top[:2]] == [t.token for t in twin.top[:2]]


def test_a_stream_adds_up_to_the_answer(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava")
    requests = [replace(request, stream=True) for request in long(questions(3, SPP))]
    tickets = [engine.submit(request) for request in requests]
    texts, parts, results = dict.fromkeys(tickets, ""), dict.fromkeys(tickets, 0), {}
    while engine.in_flight:
        engine.step()
        for update in engine.poll():
            texts[update.ticket] += update.text
            parts[update.ticket] += bool(update.text)
            if update.result is not None:
                results[update.ticket] = update.result
    for ticket in tickets:
        assert texts[ticket].strip() == results[ticket].text
        assert parts[ticket] > 2


def test_seconds_of_rows_add_up_to_the_time_that_was_busy(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava", slots=4)
    before = engine.busy_seconds
    results = engine.run(long(questions(12, SPP)))
    assert sum(r.seconds for r in results) == pytest.approx(engine.busy_seconds - before)
    assert all(result.seconds > 0 for result in results)


def test_stop_strings_and_lengths_end_answers(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava")
    (request,) = long(questions(1, SPP))
    (whole,) = engine.run([request])
    assert whole.text
    word = whole.text.split()[2]
    cut = replace(request, generation=replace(request.generation, stop=(word,)))
    short = replace(request, generation=SamplingParams(max_new_tokens=2))
    stopped, short_one = engine.run([cut, short])
    assert stopped.text == whole.text[: whole.text.index(word)].strip()
    assert stopped.finish_reason == "stop"
    assert (short_one.completion_tokens, short_one.finish_reason) == (2, "length")


def test_sampling_depends_on_its_own_seed_alone(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava")
    (request,) = long(questions(1, SPP))

    def sampled(seed: int) -> Request:
        return replace(
            request,
            generation=SamplingParams(max_new_tokens=16, temperature=2.0, seed=seed),
        )

    first, second, again = engine.run([sampled(1), sampled(2), sampled(1)])
    assert first.text == again.text
    assert first.text != second.text


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "word " * 5000},
        {"prompt": "what is <image> ?"},
        {"spec": PruneSpec(method="gird")},
        {"spec": PruneSpec(method="grid", options={"k": 1})},
        {"spec": PruneSpec(method="topk", budget=Budget(tokens=0))},
        {"spec": PruneSpec(method="fastv", budget=Budget(ratio=0.5))},
        {"generation": SamplingParams(max_new_tokens=100_000)},
    ],
)
def test_a_bad_request_fails_alone(bad: dict[str, Any], open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava")
    good = questions(2, SPP)
    first, failed, second = engine.run([good[0], replace(good[0], **bad), good[1]])
    assert (failed.error_code, failed.error_stage) == ("prompt_invalid", "prompt")
    assert failed.error_message
    assert [facts(first), facts(second)] == [facts(result) for result in engine.run(good)]


def test_a_cleared_cache_holds_nothing_of_either_side(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava", enable_prefix_caching=True)
    for spec in (DENSE, SPP):
        requests = questions(2, spec)
        engine.run(requests)
        engine.clear_caches()
        again = engine.run(requests)
        assert not any(result.cost.flops_cached for result in again)


def test_caches_are_cleared_under_requests_that_run(open_vllm: Callable[..., Any]) -> None:
    """An online request may run when a control block begins; it answers as if nothing were."""
    engine = open_vllm("tiny-llava")
    requests = [replace(request, stream=True) for request in long(questions(4, SPP))]
    expected = [facts(result) for result in engine.run(requests)]
    for steps in (1, 3, 9):
        engine.clear_caches()
        tickets = [engine.submit(request) for request in requests]
        while len(engine._running) < len(tickets):
            engine.step()
        for _ in range(steps):
            engine.step()
        engine.clear_caches()
        results = finish(engine)
        assert [facts(results[ticket]) for ticket in tickets] == expected


@pytest.mark.parametrize("option", ["async_scheduling", "dtype", "max_num_seqs", "tokenizer"])
def test_options_that_would_break_a_promise_are_refused(option: str) -> None:
    from sppruner.integrations.vllm.vllm_options import check_options

    with pytest.raises(SpecError, match=option):
        check_options({"max_model_len": 5, option: "1"})


def test_an_image_of_which_nothing_can_be_selected_fails_alone(
    open_vllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_vllm("tiny-llava")
    requests = questions(8, SPP)
    expected = [facts(result) for result in engine.run(requests)]
    engine.clear_caches()
    (broken,) = requests[3].images
    requests[3] = replace(requests[3], images=(broken.rotate(90),), id="guilty")
    (served,) = engine._llm.apply_model(lambda model: model)
    judge = served._with_relevance
    guilty: list[str] = []

    def failing(image: Any, selector: Any, request: Any) -> Any:
        if request.key == guilty[0]:
            raise OverflowError("(34, 'Numerical result out of range')")
        return judge(image, selector, request)

    monkeypatch.setattr(served, "_with_relevance", failing, raising=False)
    (rendered,) = engine._vllm.renderer.render_cmpl([engine.prompt(requests[3])])
    guilty += rendered["mm_hashes"]["image"]
    results = engine.run(requests)
    assert results[3].error_code == "inference_failed"
    assert "Numerical result" in str(results[3].error_message)
    others = [number for number in range(8) if number != 3]
    assert [facts(results[n]) for n in others] == [expected[n] for n in others]


@pytest.mark.parametrize(
    ("sampling", "code"),
    [
        ({"temperature": 0.005}, "prompt_invalid"),
        ({"temperature": 2.5}, "prompt_invalid"),
        ({"temperature": 1.0, "seed": -1}, None),
        ({"temperature": 1.0, "seed": 2**64 - 1}, None),
        ({"temperature": 1.0, "seed": -(2**63)}, None),
    ],
)
def test_sampling_is_the_request_s_or_refused(
    sampling: dict[str, Any], code: str | None, open_vllm: Callable[..., Any]
) -> None:
    engine = open_vllm("tiny-llava")
    (request,) = questions(1, SPP)
    params = SamplingParams(max_new_tokens=12, **sampling)
    first, again = engine.run([replace(request, generation=params)] * 2)
    assert first.error_code == again.error_code == code
    assert first.text == again.text


def test_a_closed_engine_takes_nothing(open_vllm: Callable[..., Any], one_engine: Any) -> None:
    engine = open_vllm("tiny-llava")
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(questions(1)[0])
    one_engine.close()


def test_images_that_come_as_embeddings_are_served_densely(open_vllm: Callable[..., Any]) -> None:
    """As vLLM serves them without the plugin."""
    engine = open_vllm("tiny-llava", enable_mm_embeds=True)
    (request,) = questions(1)
    prompt = engine.prompt(request)
    width = engine._vllm.model_config.hf_config.text_config.hidden_size
    prompt["multi_modal_data"] = {"image": torch.zeros(1, 144, width)}
    (answer,) = engine._llm.generate([prompt])
    assert answer.outputs[0].token_ids
    prompt["mm_processor_kwargs"]["prune"] = SPP.to_dict()
    with pytest.raises(InputError, match="send images"):
        engine._llm.generate([prompt])


def test_a_device_that_vllm_is_not_built_for_is_refused() -> None:
    from sppruner.integrations.vllm.engine import VllmEngine

    with pytest.raises(SpecError, match="built for cpu"):
        VllmEngine("tiny-llava", device="cuda:0")
