"""A structured answer has its format, whatever the model would say; other requests in its batch
answer as they would alone."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppruner.engine import BatchEngine, ContinuousEngine, Request, SamplingParams
from sppruner.engine.answer_format import AnswerFormat
from sppruner.engine.format_guide import FormatGuides
from sppruner.models.loading import load_model, load_processor, resolve_model
from sppruner.spec import Budget, PruneSpec
from tests.cluster.images.pictures import picture
from tests.sppruner.families.folders import PARTS, tokenizer_of, write_folder

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "big"]}, "maxItems": 2},
    },
    "required": ["shape", "sides", "tags"],
    "additionalProperties": False,
}
FORMATS = [
    AnswerFormat(choice=("red", "green and blue", "a.b")),
    AnswerFormat(regex=r"[a-c]{2,5}-[0-9]{3}"),
    AnswerFormat(json_schema=SCHEMA),
]
SPP = PruneSpec(method="sppruner", budget=Budget(ratio=0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder("llava", tmp_path_factory.mktemp("model"), by_bytes=True))


@pytest.fixture(scope="module", params=[ContinuousEngine, BatchEngine])
def engine(request: pytest.FixtureRequest, folder: str) -> Any:
    return request.param(load_model(folder), slots=4)


def ask(form: AnswerFormat | None, number: int = 0, **generation: Any) -> Request:
    params = SamplingParams(**({"max_new_tokens": 120, "format": form} | generation))
    return Request(
        id=str(number),
        prompt=f"what is {number}",
        images=(picture(32 + number, 32),),
        spec=SPP,
        generation=params,
    )


def check(form: AnswerFormat, text: str | None) -> None:
    assert text is not None
    if form.choice:
        assert text in form.choice
    elif form.regex is not None:
        assert re.fullmatch(form.regex, text)
    else:
        jsonschema.validate(json.loads(text), SCHEMA)
        assert list(json.loads(text)) == list(SCHEMA["properties"])  # type: ignore[call-overload]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_answer_has_its_format(
    engine: ContinuousEngine | BatchEngine, temperature: float
) -> None:
    requests = [
        ask(form, number, temperature=temperature, seed=number)
        for number in range(6)
        for form in FORMATS
    ]
    for request, result in zip(requests, engine.run(requests), strict=True):
        assert result.error_message is None
        assert result.finish_reason == "stop"
        assert request.generation.format is not None
        check(request.generation.format, result.text)


def test_others_in_the_batch_answer_as_alone(engine: ContinuousEngine | BatchEngine) -> None:
    requests = [
        ask(FORMATS[number % 3] if number % 2 else None, number, max_new_tokens=20)
        for number in range(6)
    ]
    together = [result.text for result in engine.run(requests)]
    assert together == [engine.run([request])[0].text for request in requests]


def test_both_engines_give_the_same_answers(folder: str) -> None:
    requests = [ask(form, number) for number, form in enumerate(FORMATS)]
    texts = [
        [result.text for result in kind(load_model(folder), slots=4).run(requests)]
        for kind in (ContinuousEngine, BatchEngine)
    ]
    assert texts[0] == texts[1]


def test_an_answer_that_is_cut_is_the_beginning_of_one(
    engine: ContinuousEngine | BatchEngine,
) -> None:
    (whole,) = engine.run([ask(FORMATS[2])])
    (cut,) = engine.run([ask(FORMATS[2], max_new_tokens=9)])
    assert cut.finish_reason == "length"
    assert whole.text is not None
    assert cut.text == whole.text[:9]


def test_a_format_that_cannot_be_followed_fails_alone(
    engine: ContinuousEngine | BatchEngine,
) -> None:
    bad = ask(AnswerFormat(regex="(a"), 1)
    first, failed, last = engine.run([ask(FORMATS[0], 0), bad, ask(None, 2)])
    assert failed.error_message is not None
    assert "regex: " in failed.error_message
    assert (first.error_code, last.error_code) == (None, None)


def test_a_token_that_the_model_cannot_say_fails_alone(
    engine: ContinuousEngine | BatchEngine,
) -> None:
    """Of its alphabet only a few letters have tokens."""
    good, failed = engine.run([ask(FORMATS[0], 0), ask(AnswerFormat(choice=("Ü",)), 1)])
    assert good.error_code is None
    assert failed.error_message is not None
    assert "answer format" in failed.error_message or "allow no token" in failed.error_message


def test_a_tokenizer_of_words_is_refused_by_name() -> None:
    engine = ContinuousEngine("tiny-llava")
    (result,) = engine.run([ask(FORMATS[0])])
    assert result.error_message is not None
    assert "not spelt in bytes" in result.error_message
    (again,) = engine.run([replace(ask(None), id="again")])
    assert again.error_code is None


LETTERS = st.text("abcdefghij 0123", min_size=1, max_size=6).map(str.strip).filter(bool)


@given(choices=st.lists(LETTERS, min_size=1, max_size=6, unique=True), seed=st.integers(0, 999))
def test_any_walk_through_the_allowed_tokens_ends_in_a_choice(
    choices: list[str], seed: int
) -> None:
    tokenizer = tokenizer_of(PARTS["llava"], by_bytes=True)
    guide = FormatGuides(tokenizer, 64).start(AnswerFormat(choice=tuple(choices)))
    draw, said = random.Random(seed), list[int]()
    while not guide.ended:
        said.append(draw.choice(guide.allowed_V(64).nonzero()[:, 0].tolist()))
        guide.add(said[-1])
    assert guide.failure is None
    assert tokenizer.decode(said, skip_special_tokens=True) in choices


def test_a_copy_stands_where_its_original_does(folder: str) -> None:
    tokenizer = load_processor(resolve_model(folder)).tokenizer
    guide = FormatGuides(tokenizer, 64).start(AnswerFormat(choice=("ab", "ac")))
    guide.add(tokenizer.convert_tokens_to_ids("a"))
    copied = guide.copy()
    guide.add(tokenizer.convert_tokens_to_ids("b"))
    allowed = copied.allowed_V(64).nonzero()[:, 0].tolist()
    assert tokenizer.convert_ids_to_tokens(allowed) == ["b", "c"]


def test_a_format_that_gives_up_midway_is_an_error(folder: str) -> None:
    """Its matcher then allows the end alone, as if the answer were complete."""
    tokenizer = load_processor(resolve_model(folder)).tokenizer
    guide = FormatGuides(tokenizer, 64).start(AnswerFormat(choice=("ab",)))
    guide.add(tokenizer.convert_tokens_to_ids("a"))
    guide.add(tokenizer.eos_token_id)
    assert guide.ended
    assert guide.failure is not None


def test_an_end_token_that_the_checkpoint_does_not_have_ends_a_structured_answer(
    folder: str,
) -> None:
    for kind in (ContinuousEngine, BatchEngine):
        loaded = load_model(folder)
        loaded.model.generation_config.eos_token_id = None
        results = kind(loaded, slots=4).run([ask(FORMATS[0], n) for n in range(3)])
        for result in results:
            assert result.finish_reason == "stop"
            assert result.completion_tokens == len(str(result.text)) + 1


def test_a_stop_string_beside_a_format_cuts_only_its_row(
    engine: ContinuousEngine | BatchEngine,
) -> None:
    form = AnswerFormat(choice=("red.blue", "greenish"))
    requests = [ask(form, number, stop=(".",)) for number in range(6)]
    for result in engine.run(requests):
        assert result.error_message is None
        assert result.text in ("red", "greenish")
