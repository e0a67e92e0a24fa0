"""What is shown of an answer while it is said is the answer itself, and never a stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sppruner.engine.detokenizer import Detokenizer
from tests.sppruner.families.folders import PARTS, tokenizer_of

TOKENIZER = tokenizer_of(PARTS["llava"])  # a token a character
texts = st.text("ab \n", max_size=30)


@given(text=texts, stops=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_answer_in_front_of_its_first_stop(text: str, stops: list[str]) -> None:
    transcript = Detokenizer(TOKENIZER, stops)
    pieces, said = [], ""
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        said += TOKENIZER.decode([token])
        pieces.append(transcript.add(token))
        assert not any(stop in transcript.text for stop in stops)
        if transcript.stopped:
            break
    pieces.append(transcript.finish())
    answer = said.lstrip()
    assert transcript.stopped == any(stop in answer for stop in stops)
    if transcript.stopped:
        answer = answer[: min(answer.find(stop) for stop in stops if stop in answer)]
    assert "".join(pieces) == transcript.text == answer.strip()


def test_special_tokens_are_not_said() -> None:
    transcript = Detokenizer(TOKENIZER)
    ids = TOKENIZER("ab", add_special_tokens=False)["input_ids"]
    for token in [ids[0], TOKENIZER.eos_token_id, ids[1]]:
        transcript.add(token)
    assert transcript.finish() == ""
    assert transcript.text == "ab"
