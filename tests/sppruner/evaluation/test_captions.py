"""CIDEr-D and BLEU-4 against values computed by hand from the papers' formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppruner.evaluation.captions import CiderD, bleu4, split_words

CORPUS = {
    "1": ["a red cat sits"],
    "2": ["a dog runs fast"],
    "3": ["the bird flies away"],
}


def test_words_are_lower_case_without_punctuation() -> None:
    assert split_words("A man's t-shirt, in RED!") == ["a", "man's", "t-shirt", "in", "red"]


def test_a_caption_equal_to_its_only_reference_scores_ten() -> None:
    cider = CiderD(CORPUS)
    assert cider.score("a red cat sits", CORPUS["1"]) == pytest.approx(10.0)
    assert cider.score("the bird flies away", CORPUS["1"]) == 0.0


def test_cider_d_of_a_partial_match_by_hand() -> None:
    """ "a red cat": document frequency of "a" is 2 of 3, of all else 1."""
    rare, common = math.log(3), math.log(3 / 2)
    one = (common**2 + 2 * rare**2) / (
        math.sqrt(common**2 + 2 * rare**2) * math.sqrt(common**2 + 3 * rare**2)
    )
    two, three = 2 / math.sqrt(2 * 3), 1 / math.sqrt(1 * 2)
    expected = 10 * math.exp(-1 / 72) * (one + two + three + 0) / 4
    assert CiderD(CORPUS).score("a red cat", CORPUS["1"]) == pytest.approx(expected)


def test_cider_d_clips_repeated_words() -> None:
    """Plain CIDEr rewards "cat cat cat cat"; CIDEr-D clips its count to the reference's."""
    rare, common = math.log(3), math.log(3 / 2)
    norms = 4 * rare * math.sqrt(common**2 + 3 * rare**2)
    assert CiderD(CORPUS).score("cat cat cat cat", CORPUS["1"]) == pytest.approx(
        10 * (rare * rare / norms) / 4
    )


def test_cider_d_is_the_mean_over_references() -> None:
    references = ["a red cat sits", "nothing in common whatsoever"]
    cider = CiderD({**CORPUS, "1": references})
    assert cider.score("a red cat sits", references) == pytest.approx(5.0)


def test_bleu_by_hand() -> None:
    """Unigrams 5/6, bigrams 3/5, trigrams 2/4, four-grams 1/3; as long as the reference."""
    value = bleu4(["the cat sat on a mat"], [["the cat sat on the mat"]])
    assert value == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_clips_and_pools_counts_over_the_corpus() -> None:
    """The paper's "the the the" is clipped to the reference's count and pooled with the other."""
    captions = ["the the the the", "a b c d e"]
    references = [["the cat is here"], ["a b c d e"]]
    assert bleu4(captions, references) == pytest.approx((6 / 9 * 4 / 7 * 3 / 5 * 2 / 3) ** 0.25)


def test_bleu_punishes_brevity_against_the_closest_reference() -> None:
    references = [["a b c d e f", "a b c d e f g h i"]]
    assert bleu4(["a b c d"], references) == pytest.approx(math.exp(1 - 6 / 4))


def test_bleu_without_a_common_four_gram_is_zero() -> None:
    assert bleu4(["a b c"], [["a b c"]]) == 0.0


@settings(deadline=None)  # the first example may wait for a busy machine
@given(st.lists(st.sampled_from("a b c d e".split()), min_size=4, max_size=12).map(" ".join))
def test_no_caption_scores_above_its_reference(caption: str) -> None:
    cider = CiderD({**CORPUS, "x": [caption]})
    assert -1e-9 <= cider.score("a b c d", [caption]) <= 10 + 1e-9
    assert cider.score(caption, [caption]) == pytest.approx(10.0)
    assert bleu4([caption], [[caption]]) == pytest.approx(1.0)
