"""A run's accuracy is the mean over its rows with references, whatever form these have."""

from __future__ import annotations

import pyarrow as pa

from cluster.output.accuracy import measure, reference_column


def test_rows_without_references_are_not_scored_and_failed_rows_count_as_wrong() -> None:
    measured = measure(["red", "x", None, "blue"], ["red", None, ["red"], []])
    assert (measured.scored, measured.mean) == (2, 0.5)


def test_no_row_with_references_is_an_accuracy_of_none() -> None:
    assert (measure(["red"], [None]).scored, measure(["red"], [None]).mean) == (0, 0.0)


def test_references_are_numbers_lists_and_annotations_too() -> None:
    annotated = [{"answer": "2", "answer_confidence": "yes"}] * 10
    measured = measure(["2", "two", "3", "two"], [2.0, ["2"] * 10, [3, 4], annotated])
    assert (measured.scored, measured.mean) == (4, 1.0)


def test_the_reference_column_is_the_committed_one() -> None:
    names = {name: pa.string() for name in ("source_answer", "answer", "source_answers")}
    assert reference_column(pa.schema(names)) == "source_answers"
    assert reference_column(pa.schema({"answer": pa.string()})) is None
