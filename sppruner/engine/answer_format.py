"""The form that an answer's text must have. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sppruner.errors import FormatError

# A grammar is compiled before its request is answered, beside those that run.
_SCHEMA_CHARACTERS: Final = 65_536
_REGEX_CHARACTERS: Final = 4_096
_CHOICES, _CHOICE_CHARACTERS = 1_000, 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """What every token of an answer is chosen for: that its text can become one of these.

    Exactly one is given. An answer that `max_new_tokens` cuts is the beginning of one; white space
    around it is no part of it, as of any answer. Raises FormatError for none, for several, and for
    what no answer can be.
    """

    json_schema: str | Mapping[str, Any] | None = None
    """A JSON schema: the answer is JSON that it allows, properties in the schema's order, without
    white space that JSON does not need. Kept as text."""

    regex: str | None = None
    """A regular expression (syntax of Rust's regex) that matches the whole answer."""

    choice: tuple[str, ...] = ()
    """Texts, one of which is the answer."""

    def __post_init__(self) -> None:
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [self.json_schema is not None, self.regex is not None, self.choice != ()]
        if sum(given) != 1:
            raise FormatError("answer format: give one of json_schema, regex and choice")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.regex is not None and not _is_text(self.regex, _REGEX_CHARACTERS):
            raise FormatError(f"regex: give a text of 1 to {_REGEX_CHARACTERS} characters")
        if not isinstance(self.choice, tuple) or not all(
            _is_text(text, _CHOICE_CHARACTERS) for text in self.choice
        ):
            raise FormatError(f"choice: give texts of 1 to {_CHOICE_CHARACTERS} characters")
        if any(text != text.strip() for text in self.choice):
            raise FormatError("choice: an answer has no white space around it, leave it out")
        if len(self.choice) > _CHOICES:
            raise FormatError(f"choice: {len(self.choice)} texts, give at most {_CHOICES}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `AnswerFormat(**values)` is its inverse."""
        if self.choice:
            return {"choice": list(self.choice)}
        if self.regex is not None:
            return {"regex": self.regex}
        return {"json_schema": self.json_schema}

    def grammar(self) -> str:
        """The grammar of llguidance. Raises FormatError for one that it cannot follow, with its
        reason."""
        from llguidance import LLMatcher, grammar_from

        if self.choice:
            grammar = grammar_from("choice", json.dumps(self.choice))
        elif self.regex is not None:
            grammar = LLMatcher.grammar_from_regex(self.regex)
        else:
            assert isinstance(self.json_schema, str)
            grammar = LLMatcher.grammar_from_json_schema(
                self.json_schema, defaults={"whitespace_flexible": False}
            )
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        if failed:
            (what,) = self.to_dict()
            raise FormatError(f"{what}: {messages[0]}")
        return grammar


def _schema_text(schema: object) -> str:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        if not _is_text(text, _SCHEMA_CHARACTERS):
            raise FormatError(f"json_schema: give 1 to {_SCHEMA_CHARACTERS} characters")
        if not isinstance(json.loads(text), dict):
            raise FormatError("json_schema: give a JSON object")
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"json_schema is no JSON: {error}") from error
    return text


def _is_text(value: object, most: int) -> bool:
    """Whether it is UTF-8 text of 1 to `most` characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
