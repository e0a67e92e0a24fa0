"""Structured answers have their format in vLLM, and are those of the library's own engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sppruner.engine import open_engine
from sppruner.engine.answer_format import AnswerFormat
from tests.sppruner.engine.test_structured_answers import FORMATS, ask, check
from tests.sppruner.integrations.vllm.requests import facts, questions
from tests.sppruner.integrations.vllm.wide_families import write_wide_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_wide_folder("llava", tmp_path_factory.mktemp("model"), by_bytes=True))


def test_answers_have_their_format_and_equal_those_of_the_engine(
    folder: str, open_vllm: Callable[..., Any]
) -> None:
    requests = [ask(form, number) for number in range(6) for form in [*FORMATS, None]]
    requests = [replace(r, generation=replace(r.generation, max_new_tokens=60)) for r in requests]
    expected = open_engine(folder, dtype="float32").run(requests)
    found = open_vllm(folder, max_model_len=256).run(requests)
    for request, result in zip(requests, found, strict=True):
        assert result.error_message is None
        if request.generation.format is not None:
            assert result.finish_reason == "stop"
            check(request.generation.format, result.text)
    assert [facts(result) for result in found] == [facts(result) for result in expected]


def test_a_format_that_cannot_be_followed_fails_alone(
    folder: str, open_vllm: Callable[..., Any]
) -> None:
    engine = open_vllm(folder, max_model_len=256)
    bad = ask(AnswerFormat(regex="(a"), 1)
    first, failed, last = engine.run([ask(FORMATS[0], 0), bad, ask(FORMATS[1], 2)])
    assert failed.error_message is not None
    assert "regex: " in failed.error_message
    assert (first.error_code, last.error_code) == (None, None)


def test_a_tokenizer_of_words_is_refused_by_name(open_vllm: Callable[..., Any]) -> None:
    engine = open_vllm("tiny-llava")
    (request,) = questions(1)
    structured = replace(request, generation=replace(request.generation, format=FORMATS[0]))
    failed, answered = engine.run([structured, request])
    assert failed.error_message is not None
    assert "not spelt in bytes" in failed.error_message
    assert answered.error_code is None
