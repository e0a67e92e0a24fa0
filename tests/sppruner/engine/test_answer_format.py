"""A structured answer's format is exactly one of three, bounded, and refused before any work."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sppruner.engine.answer_format import AnswerFormat
from sppruner.errors import SpecError

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"regex": "a", "choice": ("b",)},
        {"json_schema": {}, "regex": "a"},
        {"regex": ""},
        {"regex": "a" * 5000},
        {"regex": "\ud800"},
        {"regex": 5},
        {"choice": ("",)},
        {"choice": ("a", 5)},
        {"choice": (" a",)},
        {"choice": "red"},
        {"choice": ("a" * 1001,)},
        {"choice": ("\ud800",)},
        {"choice": tuple(str(number) for number in range(1001))},
        {"json_schema": "{"},
        {"json_schema": "[1]"},
        {"json_schema": "5"},
        {"json_schema": 5},
        {"json_schema": {"enum": [{1, 2}]}},
        {"json_schema": "[" * 60_000},
        {"json_schema": {"title": "x" * 70_000}},
    ],
)
def test_what_is_no_format_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        AnswerFormat(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "(a"},
        {"json_schema": {"type": "obj"}},
        {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}},
    ],
)
def test_what_no_text_can_follow_is_refused_with_the_reason(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(SpecError, match=f"{name}: .+"):
        AnswerFormat(**given).grammar()


@pytest.mark.parametrize(
    "form",
    [
        AnswerFormat(json_schema=SCHEMA),
        AnswerFormat(regex="[0-9]+"),
        AnswerFormat(choice=("red", 'say "x"', "a|b")),
    ],
)
def test_it_is_rebuilt_from_plain_values(form: AnswerFormat) -> None:
    rebuilt = AnswerFormat(**json.loads(json.dumps(form.to_dict())))
    assert rebuilt == form
    assert hash(rebuilt) == hash(form)
    assert rebuilt.grammar() == form.grammar()


def test_the_order_of_a_schemas_properties_is_kept() -> None:
    text = AnswerFormat(json_schema=SCHEMA).json_schema
    assert isinstance(text, str)
    assert text.index('"b"') < text.index('"a"')
    assert AnswerFormat(json_schema=text) == AnswerFormat(json_schema=SCHEMA)
