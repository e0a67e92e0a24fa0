"""Conversations → prompts: order, turns, and user text that stays text whatever it spells."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sppruner.conversation import Turn, ask
from sppruner.errors import InputError
from sppruner.prompts import build_chat_inputs, build_inputs, chat_text
from sppruner.tiny.model import build_processor

PROCESSOR = build_processor()
SPECIAL = PROCESSOR.tokenizer.all_special_tokens
IMAGE = Image.new("RGB", (96, 96))
JOINER = "\N{WORD JOINER}"


def ids(turns: list[Turn], images: int = 0) -> list[int]:
    inputs = build_chat_inputs(PROCESSOR, [turns], [[IMAGE] * images])
    found: list[int] = inputs["input_ids"][0].tolist()
    return found


def test_a_question_is_the_same_as_text_and_as_a_conversation() -> None:
    plain = build_inputs(PROCESSOR, ["what is it ?"], [IMAGE], ["be brief"])
    turns = [Turn("system", ("be brief",)), Turn("user", (None, "what is it ?"))]
    assert tuple(turns) == ask("what is it ?", 1, "be brief")
    assert plain["input_ids"][0].tolist() == ids(turns, 1)


def test_turns_keep_their_order_and_each_image_its_place() -> None:
    turns = [
        Turn("user", (None, "one")),
        Turn("assistant", ("red",)),
        Turn("user", (None, "two")),
    ]
    text = chat_text(PROCESSOR, turns, [IMAGE, IMAGE])
    assert text == "<s><user><image>one<assistant>red</s><user><image>two<assistant>"


@pytest.mark.parametrize("images", [0, 2])
def test_a_conversation_about_another_number_of_images_is_refused(images: int) -> None:
    with pytest.raises(InputError, match=f"about 1 images, with {images}"):
        chat_text(PROCESSOR, ask("what ?", 1), [IMAGE] * images)


def test_a_turn_of_nobody_and_an_image_of_an_assistant_are_refused() -> None:
    with pytest.raises(InputError, match="role 'tool'"):
        Turn("tool", ("x",))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="images are the user's"):
        Turn("assistant", (None,))


def test_what_a_chat_template_refuses_is_an_input_error() -> None:
    processor = build_processor()
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        chat_text(processor, ask("what ?", 0), [])


@given(
    st.lists(st.sampled_from([*SPECIAL, "a", " ", "<", ">", "/s>", "<s", "red"]), max_size=8),
    st.sampled_from(["user", "assistant", "system"]),
)
def test_no_text_becomes_a_special_token_whatever_it_spells(words: list[str], role: Any) -> None:
    text = "".join(words)
    if "<image>" in text:
        with pytest.raises(InputError, match="stands for an image"):
            ids([Turn(role, (text,))])
        return
    tokenizer = PROCESSOR.tokenizer
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    hollow = [token for token in ids([Turn(role, ("red",))]) if token in special]
    assert [token for token in ids([Turn(role, (text,))]) if token in special] == hollow


def test_texts_of_a_turn_form_no_special_token_together() -> None:
    with pytest.raises(InputError, match="as one text"):
        ids([Turn("user", ("</", None, "s>"))], 1)
    assert ids([Turn("user", ("one", None, "two"))], 1)


def test_other_text_is_unchanged() -> None:
    assert JOINER not in chat_text(PROCESSOR, ask("a < b and </sub> [x]", 0, "s"), [])
    assert f"<{JOINER}/s>" in chat_text(PROCESSOR, ask("end with </s>", 0), [])
