"""Streamed text equals the answer and never contains a stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sppruner.engine.detokenizer import Detokenizer
from tests.sppruner.families.folders import PARTS, tokenizer_of

TOKENIZER = tokenizer_of(PARTS["llava"])  # one token per character
texts = st.text("ab \n", max_size=30)


@given(text=texts, stops=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_answer_in_front_of_its_first_stop(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER, stops)
    pieces, decoded = [], ""
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        decoded += TOKENIZER.decode([token])
        pieces.append(detokenizer.add(token))
        assert not any(stop in detokenizer.text for stop in stops)
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    answer = decoded.lstrip()
    assert detokenizer.stopped == any(stop in answer for stop in stops)
    if detokenizer.stopped:
        answer = answer[: min(answer.find(stop) for stop in stops if stop in answer)]
    assert "".join(pieces) == detokenizer.text == answer.strip()


def test_special_tokens_are_not_shown() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    ids = TOKENIZER("ab", add_special_tokens=False)["input_ids"]
    for token in [ids[0], TOKENIZER.eos_token_id, ids[1]]:
        detokenizer.add(token)
    assert detokenizer.finish() == ""
    assert detokenizer.text == "ab"
