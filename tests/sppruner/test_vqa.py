"""Short answers are scored as VQA benchmarks score them, by one scorer for runs and evaluations."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import sppruner.vqa
from cluster.output.accuracy import measure
from sppruner.evaluation.metrics import ExactMatch, SoftAccuracy
from sppruner.vqa import normalise, normalise_lightly, references_of, score

answers = st.text(alphabet="ab 1.,'-/!ZtheTwo\n", max_size=30)
references = st.lists(answers, min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("answer", "known", "expected"),
    [
        ("Red.", ["red"], 1.0),
        ("the red circle", ["a red circle"], 1.0),
        ("Top  Left.", ["top left"], 1.0),
        ("red", ["blue"], 0.0),
        ("red", ["blue", "red"], 1.0),
        (None, ["red"], 0.0),
        (None, ["the"], 0.0),
        ("", ["A"], 0.0),
        (" . ", ["A"], 0.0),
        ("the", ["A"], 0.0),
        ("A.", ["A"], 1.0),
        ("a", ["A"], 1.0),
        ("C", ["C++"], 0.0),
        ("50", ["50%"], 0.0),
        ("1,000!", ["1000"], 1.0),
        ("10:30", ["1030"], 0.0),
        ("", ["a"] * 10, 0.0),
        (None, ["a"] * 10, 0.0),
        # Below three references number words are words: 2 is not two.
        ("two", ["2"], 0.0),
        # Ten annotators, three agree: each of the three leaves two behind when it is left out.
        ("two", ["two"] * 3 + ["three"] * 7, (7 * 1.0 + 3 * (2 / 3)) / 10),
        ("two", ["two"] * 10, 1.0),
        ("two", ["2"] * 10, 1.0),
        ("none", ["0"] * 10, 1.0),
        ("2", ["2", "3", "4"], (0 + 2 * (1 / 3)) / 3),
    ],
)
def test_scores(answer: str | None, known: list[str], expected: float) -> None:
    assert score(answer, known) == pytest.approx(expected)


@pytest.mark.parametrize(("agreeing", "worth"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_soft_accuracy_of_ten_annotators(agreeing: int, worth: float) -> None:
    """The published values: with three of ten agreeing, leaving one of them out gives 2/3."""
    annotators = ["Two."] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert score("2", annotators) == pytest.approx(worth)


def test_an_answer_without_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="without a reference"):
        score("2", [])


@given(answers, references, st.integers())
def test_a_score_is_a_share_and_the_order_of_references_does_not_matter(
    answer: str, known: list[str], seed: int
) -> None:
    shuffled = random.Random(seed).sample(known, len(known))
    assert 0.0 <= score(answer, known) <= 1.0
    assert score(answer, shuffled) == pytest.approx(score(answer, known))


@given(answers, references)
def test_a_run_and_an_evaluation_give_the_same_score(answer: str, known: list[str]) -> None:
    measured = measure([(answer, known)])
    filled = references_of(known)
    assert measured.scored == bool(filled)
    if filled:
        assert measured.mean == SoftAccuracy().score(answer, filled)
        assert ExactMatch().score(answer, filled) == score(answer, filled[:1])


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The Red Car.", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("twas", "'twas"),
        ("shed", "shed"),
        ("it's", "it's"),
        ("1,000", "1000"),
        ("1,000 (about)", "1000 about"),
        ("3.5", "3.5"),
        ("black/white", "black white"),
        ("yes, sir", "yes sir"),
        ("t-shirt", "t shirt"),
        (" a\ttall\nman ", "tall man"),
    ],
)
def test_vqa_normalisation(said: str, compared: str) -> None:
    assert normalise(said) == compared


@given(st.text(), references)
def test_an_answer_equals_itself_and_a_blank_equals_nothing(answer: str, known: list[str]) -> None:
    if answer.strip():
        assert score(answer, [answer]) == 1.0
        assert score(f" {answer.upper()} ", [answer.upper().lower()]) == 1.0
    known = [reference for reference in known if reference.strip()] or ["a"]
    for blank in ("", " ", "\n\t"):
        assert score(blank, known) == 0.0


@given(answers)
def test_normalisation_leaves_no_capitals_articles_or_double_spaces(text: str) -> None:
    for compared in (normalise(text), normalise_lightly(text)):
        assert compared == compared.lower() == " ".join(compared.split())
        articles = {"a", "an", "the"} & set(compared.split())
        assert not articles or articles == set(compared.split()), "only where nothing else is left"


def test_light_normalisation_keeps_what_tells_answers_apart() -> None:
    assert normalise_lightly("  A  Top-Left, corner! ") == "top-left corner"
    assert normalise_lightly("3.5") == "3.5"
    assert normalise_lightly("vitamin-a") == "vitamin-a"
    assert normalise_lightly("-5 °C") == "-5 °c"


@pytest.mark.parametrize(
    ("value", "known"),
    [
        ("red", ["red"]),
        (2, ["2"]),
        (2.0, ["2"]),
        (2.5, ["2.5"]),
        (["red", 2, None], ["red", "2"]),
        ({"answer": "red", "answer_confidence": "maybe"}, ["red"]),
        ([{"answer": "red"}, {"answer": ""}, {"confidence": "yes"}], ["red"]),
        (("a", ["b"]), ["a", "b"]),
        (None, []),
        ("", []),
        (" ", []),
        ([], []),
        (float("nan"), []),
    ],
)
def test_references_come_as_strings_numbers_lists_and_annotations(
    value: object, known: list[str]
) -> None:
    assert references_of(value) == known


def test_the_scorer_imports_nothing_but_the_standard_library() -> None:
    """It runs in processes without torch; `sppruner` itself loads no torch either."""
    source = Path(sppruner.vqa.__file__).read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported <= {"__future__", *sys.stdlib_module_names}
    code = "import sys, sppruner.vqa; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_references_may_be_a_list_as_json_text() -> None:
    assert references_of('["red", {"answer": "blue"}]') == ["red", "blue"]
    # An answer that is itself written with brackets stays one.
    for text in ("[12, 34]", "[red]", "[", "[" * 10_000):
        assert references_of(text) == [text]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("['red', 'blue']", ["red", "blue"]),
        (str(["it's", 'say "x"', "[1]", "c\\'s\n"]), ["it's", 'say "x"', "[1]", "c\\'s\n"]),
        (" [ 'red' ,'blue' ]", ["red", "blue"]),
        ("['dark red' 'blue'\n 'red']", ["dark red", "blue", "red"]),
        ("[\"it's\" 'red']", ["it's", "red"]),
        (str([{"answer": "red", "answer_confidence": None}, {"answer": "2"}]), ["red", "2"]),
        (
            "[{'answer': 'red'}\n {'answer': 'not {}'}\n {'answer': \"it's } {\"}]",
            ["red", "not {}", "it's } {"],
        ),
    ],
)
def test_references_may_be_a_list_as_python_and_numpy_print_it(text: str, known: list[str]) -> None:
    """Columns of lists become that in CSV."""
    assert references_of(text) == known


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters())
    | st.integers() | st.integers(4_000, 5_000).map(lambda digits: 10**digits)
    | st.sampled_from(["[1]", "['", "[{'answer': 'x'}", '["\\ud800"]', "\ud800", "[" * 2_000]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner)
    | st.dictionaries(st.sampled_from(["answer", "else"]), inner),
    max_leaves=8,
)  # fmt: skip


@given(value=HOSTILE, depth=st.integers(0, 3_000))
@example(value=10**5_000, depth=0)
def test_whatever_a_row_holds_its_references_are_texts_and_its_score_a_share(
    value: object, depth: int
) -> None:
    """One row must not cost the accuracy of all."""
    for _ in range(depth):
        value = [value] if depth % 2 else {"answer": value}
    known = references_of(value)
    assert all(isinstance(text, str) and text.strip() for text in known)
    measured = measure([("red", value), ("red", "red")])
    assert 0.0 < measured.mean <= 1.0
    assert measured.scored == 1 + bool(known)


@given(depth=st.integers(0, 3_000), quote=st.sampled_from("'\""))
@example(depth=400, quote='"')
def test_a_text_of_lists_in_lists_is_its_innermost_answer_or_itself(depth: int, quote: str) -> None:
    text = f"[{{{quote}answer{quote}: {'[' * depth}{quote}red{quote}{']' * depth}}}]"
    assert references_of(text) in (["red"], [text])


@pytest.mark.parametrize(
    "text",
    [
        "['red', None]",
        "['red']['blue']",
        "['red'], ['blue']",
        "['red'",
        "['red', x]",
        "[{[]: 1}]",
        "[{" * 5_000,
        "[{'a': " + "-" * 9_000 + "1}]",
        "['red\0']",
        "['" + "\\'" * 8_000,
        str(["red"] * 5_000),
    ],
)
def test_a_text_that_only_begins_like_a_printed_list_is_one_answer(text: str) -> None:
    """Whatever it is: Python's parser is asked about short texts alone."""
    started = time.perf_counter()
    assert references_of(text) == [text]
    assert time.perf_counter() - started < 1
