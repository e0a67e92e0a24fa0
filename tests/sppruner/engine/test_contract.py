"""The contract of every engine: answers in order, isolated errors, true reports."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sppruner.adapters import Encoded, Kept, LlavaAdapter
from sppruner.conversation import Turn
from sppruner.engine import BatchEngine, ContinuousEngine, Request, Result, SamplingParams
from sppruner.engine.base import ModelEngine
from sppruner.errors import EngineError, PruningHadNoEffect, SpecError
from sppruner.models.loading import LoadedModel
from sppruner.prompts import build_chat_inputs
from sppruner.spec import DENSE, Budget, PruneSpec
from sppruner.tiny.model import VISUAL_TOKENS
from tests.sppruner.engine.requests import scaled_model

NEW = SamplingParams(max_new_tokens=4)
GRID = PruneSpec(method="grid", budget=Budget(ratio=0.25))
SPP = PruneSpec(method="sppruner", budget=Budget(ratio=0.111))
TALK = (
    Turn("system", ("be brief",)),
    Turn("user", ("first", None, "what color ?")),
    Turn("assistant", ("red",)),
    Turn("user", (None, "and this ?")),
)
MOVED = PruneSpec(method="topk", budget=Budget(tokens=20), positions="renumber")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Random weights, scaled up so that answers depend on the image."""
    return scaled_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=[BatchEngine, ContinuousEngine])
def engine(request: pytest.FixtureRequest, loaded: LoadedModel) -> Iterator[ModelEngine]:
    made = request.param(loaded, slots=4)
    yield made
    if isinstance(made, ContinuousEngine):
        made.close()


def picture(seed: int) -> Image.Image:
    noise = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(seed))
    small = Image.fromarray(noise.to(torch.uint8).numpy())
    return small.resize((96, 96), Image.Resampling.NEAREST)


def request(name: str, *, images: int = 1, **changes: Any) -> Request:
    seed = sum(map(ord, name))
    shown = tuple(picture(seed + i) for i in range(images))
    return replace(
        Request(id=name, prompt=f"what color is the {name} ?", images=shown, generation=NEW),
        **changes,
    )


def facts(result: Result) -> Result:
    """The result without its seconds and what caches spared it."""
    cost = None if result.cost is None else replace(result.cost, flops_cached={})
    return replace(result, seconds=0.0, cost=cost)


def loaded_context(engine: ModelEngine) -> int:
    context = engine._model.config.get_text_config().max_position_embeddings
    assert isinstance(context, int)
    return context


def mixed() -> list[Request]:
    return [
        request("cat", spec=GRID),
        request("a dog", spec=SPP),
        request("sky", images=0),
        request("a", spec=DENSE),
        request("two", images=2, spec=SPP),
        request("red", spec=MOVED),
        request("long", spec=GRID, generation=SamplingParams(max_new_tokens=9)),
        request("blue", spec=GRID, system="be brief"),
        request("text", images=0, spec=GRID),
        request("talk", images=2, spec=SPP, turns=TALK),
    ]


def test_mixed_requests_come_back_in_order_with_the_results_of_single_requests(
    engine: ModelEngine,
) -> None:
    requests = mixed()
    together = engine.run(requests)
    assert [r.id for r in together] == [r.id for r in requests]
    assert not [r.error_message for r in together if r.error_code]
    for one, result in zip(requests, together, strict=True):
        assert facts(engine.run([one])[0]) == facts(result)


def test_results_count_the_tokens_of_their_own_spec(engine: ModelEngine) -> None:
    for one, result in zip(mixed(), engine.run(mixed()), strict=True):
        n = len(one.images)
        kept = n * one.spec.budget.count(VISUAL_TOKENS)
        assert (result.visual_tokens, result.visual_tokens_kept) == (n * VISUAL_TOKENS, kept)
        assert len(result.kept_tokens) == n * VISUAL_TOKENS // 8
        assert int.from_bytes(result.kept_tokens, "little").bit_count() == kept
        assert result.seconds > 0
        assert result.cost is not None
        pruned = result.visual_tokens_kept < result.visual_tokens
        assert (result.cost.flops["prefill"] < result.cost.flops_dense["prefill"]) == pruned
        assert (result.cost.flops["pruner"] > 0) == (one.spec == SPP)


def test_selection_flops_grow_linearly_with_the_number_of_images(engine: ModelEngine) -> None:
    one, two = engine.run([request("a", spec=SPP), request("b", images=2, spec=SPP)])
    assert one.cost is not None
    assert two.cost is not None
    assert two.cost.flops["pruner"] == 2 * one.cost.flops["pruner"]


def test_a_conversation_is_answered_as_generate_answers_it(
    engine: ModelEngine, loaded: LoadedModel
) -> None:
    asked = request("talk", images=2, turns=TALK)
    inputs = build_chat_inputs(loaded.processor, [TALK], [asked.images])
    length = inputs["input_ids"].shape[1]
    tokens = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, length:]
    text = loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    (result,) = engine.run([asked])
    assert (result.text, result.prompt_tokens) == (text, length)
    assert result.visual_tokens == 2 * VISUAL_TOKENS


def test_an_answer_is_cut_to_the_context_only_where_the_request_takes_that(
    engine: ModelEngine,
) -> None:
    context = loaded_context(engine)
    prompt = "red " * (context - 6)  # behind it room for a few tokens
    long = SamplingParams(max_new_tokens=100)
    asked = request("long", images=0, prompt=prompt, generation=long)
    refused, cut, none_left = engine.run(
        [
            asked,
            replace(asked, fit_context=True),
            replace(asked, prompt="red " * context, fit_context=True),
        ]
    )
    assert refused.error_code == none_left.error_code == "prompt_invalid"
    assert cut.error_code is None
    assert cut.prompt_tokens + cut.completion_tokens <= context
    assert cut.finish_reason == "stop" or cut.prompt_tokens + cut.completion_tokens == context


def test_probabilities_of_tokens_are_those_of_the_models_own_logits(loaded: LoadedModel) -> None:
    engine = ContinuousEngine(loaded, slots=4)
    batch = [
        request("cat", spec=GRID, logprobs=3),
        request("red"),
        request("sky", images=0, logprobs=0),
    ]
    told, silent, chosen = engine.run(batch)
    engine.close()
    assert silent.logprobs == ()
    plain = [replace(facts(r), logprobs=()) for r in (told, chosen)]
    alone = ContinuousEngine(loaded, slots=4)
    assert plain == [facts(alone.run([replace(r, logprobs=None)])[0]) for r in (batch[0], batch[2])]
    alone.close()
    tokenizer = loaded.processor.tokenizer
    for result, alternatives in ((told, 3), (chosen, 0)):
        assert len(result.logprobs) in (result.completion_tokens - 1, result.completion_tokens)
        assert all(len(token.top) == alternatives for token in result.logprobs)
        assert all(token.logprob <= 0 for token in result.logprobs)
    # Greedy: each token is the first of its alternatives.
    for token in told.logprobs:
        assert (token.token, token.logprob) == (token.top[0].token, token.top[0].logprob)
        assert [one.logprob for one in token.top] == sorted(
            (one.logprob for one in token.top), reverse=True
        )
    # The first token, by the model itself.
    inputs = build_chat_inputs(loaded.processor, [batch[2].conversation], [()])
    with torch.inference_mode():
        logits_V = loaded.model(input_ids=inputs["input_ids"]).logits[0, -1].float()
    first = chosen.logprobs[0]
    number = int(logits_V.argmax())
    assert first.token == tokenizer.decode([number])
    assert first.logprob == pytest.approx(float(logits_V.log_softmax(-1)[number]), abs=1e-4)


@pytest.mark.parametrize("logprobs", [-1, 21])
def test_more_alternatives_than_are_told_are_refused(engine: ModelEngine, logprobs: int) -> None:
    (result,) = engine.run([request("cat", logprobs=logprobs)])
    assert result.error_code == "prompt_invalid"


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "word " * 3000},
        {"turns": (Turn("user", ("what is <image> ?",)),)},
        {"prompt": "what is <image> ?"},
        {"system": "<image>"},
        {"spec": PruneSpec(method="gird")},
        {"spec": PruneSpec(method="grid", options={"k": 1})},
        {"spec": PruneSpec(method="sppruner", options={"relevance": "clip"})},
    ],
)
@pytest.mark.parametrize("images", [0, 1])
def test_a_bad_request_becomes_an_error_and_its_neighbours_are_unchanged(
    engine: ModelEngine, bad: dict[str, Any], images: int
) -> None:
    if "spec" in bad and images == 0:
        images = 2
    good = [request("cat", spec=GRID, images=images), request("red", spec=GRID, images=images)]
    broken = request("bad", images=images, **({"spec": GRID} | bad))
    first, failed, second = engine.run([good[0], broken, good[1]])
    assert (failed.id, failed.text, failed.cost) == ("bad", None, None)
    assert (failed.error_code, failed.error_stage) == ("prompt_invalid", "prompt")
    assert failed.error_message
    assert [facts(first), facts(second)] == [facts(engine.run([g])[0]) for g in good]


def test_a_failure_of_the_model_is_no_prompt_error(
    engine: ModelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._model.model.language_model, "forward", broken)
    results = engine.run([request("a"), request("b", spec=GRID)])
    assert [r.error_code for r in results] == ["inference_failed"] * 2
    assert [r.error_stage for r in results] == ["infer"] * 2


def test_a_seed_samples_the_same_text_in_any_company(engine: ModelEngine) -> None:
    def sampled(seed: int) -> Request:
        params = SamplingParams(max_new_tokens=12, temperature=1.5, seed=seed)
        return request("cat", spec=GRID, generation=params)

    single = engine.run([sampled(3)])[0].text
    torch.rand(5)
    batch = engine.run([request("a"), sampled(4), sampled(3), request("b", spec=GRID)])
    assert batch[2].text == single
    assert batch[1].text != single


class IgnoresTheSelection(LlavaAdapter):
    """Passes every feature on, whatever was selected."""

    def pack(self, encoded: Encoded, kept: Sequence[Kept]) -> Any:
        return super().pack(
            encoded,
            [
                Kept(index_K=torch.arange(image.count), features_KD=image.run_ND)
                for image in encoded.images
            ],
        )


def test_rows_whose_pruning_had_no_effect_are_errors_and_dense_rows_are_not(
    engine: ModelEngine,
) -> None:
    engine._pruner.adapter = IgnoresTheSelection(engine._model)
    pruned, dense = engine.run([request("a", spec=GRID), request("b")])
    assert pruned.error_code == "pruning_no_effect"
    assert dense.error_code is None


def test_a_model_that_ignores_a_selection_fails_in_warm_up(
    engine: ModelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._pruner, "adapter", IgnoresTheSelection(engine._model))
        with pytest.raises(PruningHadNoEffect, match="72 of 144"):
            engine.warm_up()
    engine.warm_up()


def test_an_engine_that_cannot_answer_at_all_fails_in_warm_up(
    engine: ModelEngine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = loaded.model.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", 4)
    with pytest.raises(EngineError, match="context"):
        type(engine)(loaded).warm_up()


def test_answers_end_at_max_new_tokens(engine: ModelEngine) -> None:
    for limit in (1, 6):
        (answer,) = engine.run([request("a", generation=SamplingParams(max_new_tokens=limit))])
        assert (answer.finish_reason, answer.completion_tokens) == ("length", limit)


def varied(engine: ModelEngine) -> tuple[Request, list[str]]:
    """A request whose answer consists of different words, and these words."""
    for seed in range(50):
        params = replace(NEW, temperature=1.5, seed=seed)
        sampled = request("a", generation=params)
        words = str(engine.run([sampled])[0].text).split()
        if len(set(words)) == NEW.max_new_tokens:
            return sampled, words
    raise AssertionError("no such answer")


def test_an_answer_ends_at_the_end_token_and_its_neighbours_continue(
    engine: ModelEngine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, words = varied(engine)
    greedy = engine.run([request("b")])[0]
    assert words[1] not in str(greedy.text)
    end = loaded.processor.tokenizer.convert_tokens_to_ids(words[1])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", end)
    stopped, other = type(engine)(loaded).run([sampled, request("b")])
    assert (stopped.finish_reason, stopped.completion_tokens) == ("stop", 2)
    assert stopped.text == " ".join(words[:2]), "the end token is a word here"
    assert facts(other) == facts(greedy)


def test_an_answer_is_cut_in_front_of_a_stop_string(engine: ModelEngine) -> None:
    sampled, words = varied(engine)
    stop = ("not in the answer", " ".join(words[1:3]))
    stopping = replace(sampled, generation=replace(sampled.generation, stop=stop))
    (cut,) = engine.run([stopping])
    assert (cut.finish_reason, cut.text, cut.completion_tokens) == ("stop", words[0], 3)
    absent = replace(sampled, generation=replace(sampled.generation, stop=stop[:1]))
    assert facts(engine.run([absent])[0]) == facts(engine.run([sampled])[0])


def test_the_context_limit_counts_the_unpruned_prompt_and_the_answer(
    engine: ModelEngine,
) -> None:
    dense = engine.run([request("a")])[0]
    left = 2048 - dense.prompt_tokens
    engine._model.generation_config.max_time = 0.01  # The limit is checked, not run to its end.
    try:
        fits = engine.run([request("a", spec=GRID, generation=SamplingParams(max_new_tokens=left))])
        over = engine.run(
            [request("a", spec=GRID, generation=SamplingParams(max_new_tokens=left + 1))]
        )
    finally:
        engine._model.generation_config.max_time = None
    assert fits[0].error_code is None
    assert over[0].error_code == "prompt_invalid"


@pytest.mark.parametrize("made", [BatchEngine, ContinuousEngine])
def test_an_engine_without_slots_is_refused(made: type[ModelEngine], loaded: LoadedModel) -> None:
    for slots in (0, -1):
        with pytest.raises(SpecError, match="give at least 1"):
            made(loaded, slots=slots)


def test_a_closed_engine_takes_no_requests(engine: ModelEngine) -> None:
    engine.close()  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="closed"):
        engine.run([request("cat")])


def test_a_run_leaves_the_results_of_earlier_requests_to_poll(engine: ModelEngine) -> None:
    early = engine.submit(request("cat", priority=1))
    later = engine.submit(request("dog", priority=-1))
    (result,) = engine.run([request("sky")])
    assert (result.id, result.error_code) == ("sky", None)
    ended: list[int] = []
    while len(ended) < 2:
        ended += [update.ticket for update in engine.poll() if update.result is not None]
        engine.step()
    assert set(ended) == {early, later}


@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_cut_alike_in_any_engine_and_company(loaded: LoadedModel, seed: int) -> None:
    """Pieces of the answers as stop strings, with and without white space, and strings that never
    occur: text, tokens and reason are those of the request alone."""
    rng = random.Random(seed)
    names = ["cat", "a dog", "sky", "a", "tree", "two cups"]
    long = SamplingParams(max_new_tokens=12)
    batch, continuous = BatchEngine(loaded, slots=4), ContinuousEngine(loaded, slots=4)
    try:
        plain = continuous.run([request(name, generation=long) for name in names])
        texts = [str(result.text) for result in plain]
        requests = []
        for _ in range(12):
            text = f" {rng.choice(texts)}"
            start = rng.randrange(len(text))
            stop = text[start : start + rng.randint(1, 3)]
            stops = rng.choice([(stop,), (stop, "\n"), ("never",), (" ", stop)])
            generation = replace(long, stop=stops)
            requests.append(request(rng.choice(names), spec=GRID, generation=generation))
        alone = [facts(continuous.run([one])[0]) for one in requests]
        assert [facts(result) for result in continuous.run(requests)] == alone
        assert [facts(result) for result in batch.run(requests)] == alone
        assert "stop" in {result.finish_reason for result in alone}
    finally:
        continuous.close()


def test_no_requests_give_no_results(engine: ModelEngine) -> None:
    assert engine.run([]) == []


def test_the_engine_names_its_model_by_content(engine: ModelEngine, loaded: LoadedModel) -> None:
    assert Path(engine.model_id).is_dir()
    assert engine.model_revision == loaded.identity.revision
    assert engine.image_backend == "pil"
    assert engine.dtype == "float32"


def test_the_heart_beats_with_every_token(engine: ModelEngine) -> None:
    """Whoever watches allows no more silence than the steps of other requests take."""
    beats = steps = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    engine.heartbeat = beat
    for name in ("cat", "red"):
        engine.submit(request(name, spec=SPP))
    while engine.step():
        steps += 1
    results = [update.result for update in engine.poll() if update.result is not None]
    assert [result.error_code for result in results] == [None, None]
    assert beats + steps >= NEW.max_new_tokens - 1, "each step of an engine is a beat too"


def test_an_engine_whose_caches_are_cleared_answers_as_before(engine: ModelEngine) -> None:
    batch = [request("cat", spec=SPP), request("red"), request("cat", spec=SPP)]

    def answers() -> list[str]:
        # Of two equal requests, the one that is prepared first pays for what the other finds.
        return sorted(repr(replace(result, seconds=0.0)) for result in engine.run(batch))

    first = answers()
    answers()
    engine.clear_caches()
    assert answers() == first, "also what was found in the caches"
