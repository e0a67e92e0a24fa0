"""Messages as client libraries send them become turns that a chat template takes."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster.errors import ApiError
from cluster.serving.http.chat_schema import Message
from cluster.serving.http.chat_turns import Conversation, read_conversation
from sppruner.conversation import Turn

PICTURE = {"type": "image_url", "image_url": {"url": "data:a"}}
OTHER = {"type": "image_url", "image_url": "data:b", "detail": "low"}


def text(words: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": words}


def read(*messages: dict[str, Any]) -> Conversation:
    return read_conversation([Message.model_validate(message) for message in messages])


def test_one_question_behind_its_images_is_no_conversation() -> None:
    asked = read(
        {"role": "developer", "content": "brief"},
        {"role": "system", "content": [text("polite")]},
        {"role": "user", "content": [PICTURE, OTHER, text("what"), text("is it ?")]},
    )
    assert (asked.prompt, asked.system, asked.turns) == ("what\nis it ?", "brief\npolite", ())
    assert asked.urls == ("data:a", "data:b")
    assert asked.details == ("auto", "low")


def test_order_of_texts_and_images_is_kept() -> None:
    asked = read(
        {"role": "user", "content": [text("Image 1:"), PICTURE, text("Image 2:"), OTHER, text("?")]}
    )
    assert asked.turns == (Turn("user", ("Image 1:", None, "Image 2:", None, "?")),)
    assert asked.prompt == "Image 1:\nImage 2:\n?"


def test_assistant_and_tool_messages_are_turns_and_those_of_one_side_are_one() -> None:
    asked = read(
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [PICTURE, text("look it up")]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "a cat"},
        {"role": "user", "content": "so ?"},
        {"role": "assistant", "content": [text("a cat", "output_text")], "refusal": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no more"}]},
        {"role": "user", "content": "sure ?", "name": "me"},
    )
    assert asked.turns == (
        Turn("system", ("brief",)),
        Turn("user", (None, "look it up")),
        Turn("assistant", ('{"name": "find", "arguments": "{}"}',)),
        Turn("user", ("a cat\nso ?",)),
        Turn("assistant", ("a cat\nno more",)),
        Turn("user", ("sure ?",)),
    )
    assert asked.prompt == "sure ?"


def test_messages_without_content_are_left_out() -> None:
    asked = read(
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "user", "content": ""},
        {"role": "user", "content": "what ?"},
    )
    assert (asked.prompt, asked.turns) == ("what ?", ())


def test_many_messages_of_one_side_cost_what_their_texts_cost() -> None:
    messages = [{"role": "user", "content": "☺" * 20_000} for _ in range(1000)]
    parsed = [Message.model_validate(message) for message in messages]
    started = time.process_time()
    asked = read_conversation(parsed)
    assert len(asked.prompt) == 1000 * 20_001 - 1
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "system", "content": "x"}], "no message of role user"),
        ([{"role": "user", "content": None}], "no message of role user"),
        ([{"role": "assistant", "content": [PICTURE]}], "images belong in user messages"),
        ([{"role": "system", "content": [PICTURE]}], "images belong in user messages"),
    ],
)
def test_messages_without_a_question_and_images_of_others_are_refused(
    messages: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        read(*messages)
    assert caught.value.param == "messages"
