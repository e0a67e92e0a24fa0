"""Whatever ends a run is one line: the error of ours that is in it, or else what it was."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pytest
import ray
from hypothesis import example, given
from hypothesis import strategies as st
from ray.exceptions import RayTaskError
from structlog.testing import capture_logs

from cluster.errors import StoreError, Unexpected
from cluster.unexpected import as_run_error, run_error

TRACE = """ray::f() (pid=77, ip=10.0.0.5)
  File "/x/rows.py", line 7, in f
    g()
  File "/x/parquet.pxi", line 9, in g
boom"""


def wrapped_by_ray(cause: Exception) -> list[Exception]:
    """An error of a task as Ray raises it, and as others chain it."""
    plain = RayTaskError("f", TRACE, cause)
    dual = plain.as_instanceof_cause()
    outer = RayTaskError("g", TRACE, dual)
    return [plain, dual, outer]


def test_the_root_run_error_is_found_in_rays_exception_chain() -> None:
    chained = RuntimeError("outer")
    for error in wrapped_by_ray(StoreError("gone")):
        chained.__cause__ = error
        for outer in (chained, error):
            for found in (run_error(outer), as_run_error(outer)):
                assert isinstance(found, StoreError)
                assert str(found) == "gone", "the message is for people, without Ray's stack"
    assert run_error(ValueError("x")) is None


@pytest.mark.parametrize("cause", [pa.ArrowInvalid("no\nfooter"), ValueError("x"), KeyError("y")])
def test_what_a_task_raised_says_what_and_where_and_its_lines_are_logged(cause: Exception) -> None:
    for error in wrapped_by_ray(cause):
        with capture_logs() as logged:
            told = as_run_error(error)
        assert isinstance(told, Unexpected)
        said = " ".join(str(cause).split())
        place = "in a task of Ray on 10.0.0.5, process 77;"
        assert str(told).startswith(f"{type(cause).__name__}: {said}, {place}")
        first, second = logged
        assert (first["log_level"], second["log_level"]) == ("error", "debug")
        assert first["lines"].endswith("rows.py:7 parquet.pxi:9")
        assert "parquet.pxi" in second["traceback"]


def test_an_error_of_this_process_names_its_lines() -> None:
    try:
        int("x")
    except ValueError as error:
        with capture_logs() as logged:
            told = as_run_error(error)
    assert str(told).startswith("ValueError: invalid literal for int() with base 10: 'x'; ")
    assert "SPPRUNER_LOG_LEVEL=debug" in str(told)
    assert logged[0]["lines"].startswith("test_unexpected.py:")


def test_a_task_s_error_of_another_form_is_named_too() -> None:
    assert "ValueError: x, in a task of Ray; " in str(
        as_run_error(RayTaskError("f", "boom", ValueError("x")))
    )
    causeless = RayTaskError("f", "boom", ValueError("x"))
    causeless.cause = "of no class here"
    assert "RayTaskError" in str(as_run_error(causeless))


@given(text=st.text(max_size=1000))
@example(text="x y " * 300)
def test_whatever_an_error_says_it_is_one_short_line(text: str) -> None:
    told = str(as_run_error(ValueError(text)))
    assert len(told.splitlines()) == 1
    assert len(told) < 700


def test_the_error_travels() -> None:
    told = pickle.loads(pickle.dumps(Unexpected("x")))
    assert (type(told), str(told), told.exit_code) == (Unexpected, "x", 1)


def test_a_real_task_s_error_is_named(local_ray: None) -> None:
    @ray.remote
    def fail() -> None:
        raise pa.ArrowInvalid("no footer")

    with capture_logs() as logged, pytest.raises(pa.ArrowInvalid) as raised:
        ray.get(fail.remote())
    with capture_logs() as logged:
        told = str(as_run_error(raised.value))
    assert told.startswith("ArrowInvalid: no footer, in a task of Ray on ")
    assert "test_unexpected.py:" in logged[0]["lines"]
