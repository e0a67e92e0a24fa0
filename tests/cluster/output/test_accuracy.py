"""Short answers are scored as the VQA data sets score them."""

from __future__ import annotations

import pytest

from cluster.output.accuracy import measure, normalise, score


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Red.", ["red"], 1.0),
        ("the red circle", ["a red circle"], 1.0),
        ("red", ["blue"], 0.0),
        (None, ["red"], 0.0),
        # Ten annotators, three agree: each of the three leaves two behind when it is left out.
        ("two", ["two"] * 3 + ["three"] * 7, (7 * 1.0 + 3 * (2 / 3)) / 10),
        ("two", ["two"] * 10, 1.0),
        ("two", ["2"] * 10, 0.0),
    ],
)
def test_scores(answer: str | None, references: list[str], expected: float) -> None:
    assert score(answer, references) == pytest.approx(expected)


def test_normalising_keeps_what_tells_answers_apart() -> None:
    assert normalise("  A  Top-Left, corner! ") == "top-left corner"
    assert normalise("3.5") == "3.5"


def test_rows_without_references_are_not_scored_and_failed_rows_count_as_wrong() -> None:
    measured = measure(["red", "x", None, "blue"], ["red", None, ["red"], []])
    assert (measured.scored, measured.mean) == (2, 0.5)
