"""What a checkpoint's generation config says of every answer is read, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from sppruner.engine.answer_rules import AnswerRules, end_ids
from sppruner.errors import UnsupportedModel


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, set()), (2, {2}), ([2, 7], {2, 7}), ([], set())]
)
def test_one_end_token_several_or_none(eos: Any, expected: set[int]) -> None:
    config = GenerationConfig(eos_token_id=eos)
    assert end_ids(config) == expected == AnswerRules.of(config).end_ids


def test_penalty_and_suppressed_tokens_are_read() -> None:
    rules = AnswerRules.of(GenerationConfig(repetition_penalty=1.05, suppress_tokens=[9, 4]))
    assert (rules.repetition_penalty, rules.suppressed_ids) == (1.05, (4, 9))
    rules = AnswerRules.of(GenerationConfig())
    assert (rules.repetition_penalty, rules.suppressed_ids) == (1.0, ())


@pytest.mark.parametrize(
    "setting", [{"no_repeat_ngram_size": 2}, {"bad_words_ids": [[1]]}, {"min_new_tokens": 3}]
)
def test_an_unsupported_setting_is_refused_by_name(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(UnsupportedModel, match=f"{name}=.*BatchEngine"):
        AnswerRules.of(GenerationConfig(**setting))
