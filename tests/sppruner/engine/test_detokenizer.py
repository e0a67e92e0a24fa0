"""Streamed text equals the answer and never contains a stop string."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

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


PIECES = ["<unk>", "a", "▁b", *(f"<0x{byte:02X}>" for byte in range(256))]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """As the Llama family's: what is no piece is spelt in bytes."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(
    st.lists(
        st.sampled_from(["a", "▁b", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>"]), max_size=20
    ),
    st.sampled_from([[], ["b"], ["b" * 100_000]]),
)
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_text_cost_nothing_but_themselves(
    pieces: list[str], stops: list[str]
) -> None:
    """A model may say any token; the library raises at some orders of bytes."""
    detokenizer = Detokenizer(byte_tokenizer(), stops)
    shown = "".join(detokenizer.add(PIECES.index(piece)) for piece in pieces)
    shown += detokenizer.finish()
    assert shown == detokenizer.text
    if not detokenizer.stopped:
        text = "".join({"a": "a", "▁b": " b"}.get(piece, "?") for piece in pieces)
        assert _words(shown) == _words(text)


def _words(text: str) -> list[str]:
    """By spaces; bytes alone may be anything."""
    return re.sub("[^ab ]", "", text).split()
