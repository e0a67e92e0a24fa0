"""Answers are compared as the benchmarks compare them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppruner.evaluation.answers import normalised, plain, soft_accuracy, yes_or_no


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The Red Car.", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("it's", "it's"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("black/white", "black white"),
        ("yes, sir", "yes sir"),
        ("t-shirt", "t shirt"),
        (" a\ttall\nman ", "tall man"),
    ],
)
def test_vqa_normalisation(said: str, compared: str) -> None:
    assert normalised(said) == compared


@given(st.text(alphabet="ab 1.,'-/!ZtheTwo\n", max_size=30))
def test_normalisation_leaves_no_capitals_articles_or_double_spaces(text: str) -> None:
    words = normalised(text)
    assert words == words.lower() == " ".join(words.split())
    assert not {"a", "an", "the"} & set(words.split())


@pytest.mark.parametrize(("agreeing", "worth"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_soft_accuracy_of_ten_annotators(agreeing: int, worth: float) -> None:
    """The published values: with three of ten agreeing, leaving one of them out gives 2/3."""
    annotators = ["Two."] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert soft_accuracy("2", annotators) == pytest.approx(worth)


def test_soft_accuracy_without_annotators_is_an_error() -> None:
    with pytest.raises(ValueError, match="annotator"):
        soft_accuracy("2", [])


def test_plain_comparison_ignores_case_spaces_and_a_full_stop() -> None:
    assert plain(" Top  Left. ") == "top left"


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("No, there is not.", "no"),
        ("There is not a dog in it", "no"),
        ("Yes. There is no doubt.", "yes"),
        ("A northern nose", "yes"),
    ],
)
def test_a_yes_or_a_no_is_read_off_the_first_sentence(said: str, read: str) -> None:
    assert yes_or_no(said) == read
