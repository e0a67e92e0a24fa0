"""A run's accuracy is the mean over its rows with references, whatever form these have."""

from __future__ import annotations

import pyarrow as pa
import pytest

from cluster.corpus.columns import ColumnMapping
from cluster.output.accuracy import answers_of_records, measure, reference_column


def test_rows_without_references_are_not_scored_and_failed_rows_count_as_wrong() -> None:
    measured = measure([("red", "red"), ("x", None), (None, ["red"]), ("blue", [])])
    assert (measured.scored, measured.mean) == (2, 0.5)


def test_no_row_with_references_is_an_accuracy_of_none() -> None:
    measured = measure([("red", None)])
    assert (measured.scored, measured.mean) == (0, 0.0)


def test_references_are_numbers_lists_and_annotations_too() -> None:
    annotated = [{"answer": "2", "answer_confidence": "yes"}] * 10
    measured = measure([("2", 2.0), ("two", ["2"] * 10), ("3", [3, 4]), ("two", annotated)])
    assert (measured.scored, measured.mean) == (4, 1.0)


def mapping(*committed: str, question: str = "question") -> ColumnMapping:
    columns = tuple((name.removeprefix("source_"), name) for name in committed)
    schema = pa.schema([(name, pa.string()) for name in committed])
    return ColumnMapping(columns=columns, schema=schema, question=question)


def test_the_reference_column_is_the_committed_one() -> None:
    assert (
        reference_column(mapping("source_answer", "answer", "source_answers")) == "source_answers"
    )
    assert reference_column(mapping("answer")) is None


def test_the_records_that_hold_the_questions_are_looked_at_where_no_column_holds_references() -> (
    None
):
    assert reference_column(mapping("cls", "json", question="json")) == "json"
    assert reference_column(mapping("answers", "json", question="json")) == "answers"
    assert reference_column(mapping("json", question="question.txt")) is None
    assert reference_column(mapping(question="json")) is None


@pytest.mark.parametrize(
    ("record", "known"),
    [
        ('{"question": "q", "answers": ["red", "blue"]}', ["red", "blue"]),
        ('{"answer": "red"}', ["red"]),
        ('{"answers": [{"answer": "red"}], "answer": "blue"}', ["red"]),
        ('{"answers": null, "answer": 2}', ["2"]),
        ('{"question": "q"}', []),
        ('{"answer": "half \\ud800"}', ["half ?"]),
        ("[1]", []),
        ("{broken", []),
        ("[" * 100_000, []),
        ('{"answers": ' + "[" * 900 + "]" * 900 + "}", []),
        (None, []),
    ],
)
def test_a_record_gives_its_answers_whatever_it_is(record: str | None, known: list[str]) -> None:
    assert answers_of_records(pa.chunked_array([[record]], pa.string())).to_pylist() == [known]
