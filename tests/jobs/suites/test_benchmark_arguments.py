"""The benchmark's command line refuses options without effect, and rounds alternate."""

from __future__ import annotations

import pytest

from jobs.benchmark import SUITES, main
from jobs.suites.result import alternate, summarise_known_rounds, summarise_rounds

VALUES = {
    "model": "tiny-qwen",
    "shape": "tiny",
    "methods": "topk",
    "peer": "python",
    "dtype": "bfloat16",
    "threads": "1",
}


@pytest.mark.parametrize(
    ("suite", "option"),
    [(suite, option) for suite in SUITES for option in VALUES if option not in SUITES[suite]],
)
def test_an_option_of_another_suite_is_refused_with_the_suites_it_applies_to(
    suite: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--suite", suite, f"--{option}", VALUES[option]]) == 2
    errors = capsys.readouterr().err
    assert f"--{option} is for suite" in errors
    assert f"leave it out of --suite {suite}" in errors
    for name, options in SUITES.items():
        assert (option not in options) or name in errors


def test_a_shape_and_a_model_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "pipeline", "--shape", "llava", "--model", "tiny-qwen"]) == 2
    assert "--shape llava brings its own model" in capsys.readouterr().err


def test_zero_threads_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "pipeline", "--threads", "0"]) == 2
    assert "give at least 1" in capsys.readouterr().err


def test_every_second_round_is_reversed() -> None:
    assert [list(alternate("abc", number)) for number in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


def test_a_figure_is_the_median_over_rounds_with_its_range() -> None:
    assert summarise_rounds([3.0, 1.0, 8.0]) == {"value": 3.0, "low": 1.0, "high": 8.0}
    assert summarise_known_rounds([3.0, 1.0, 8.0]) == summarise_rounds([3.0, 1.0, 8.0])


def test_a_figure_that_is_unknown_in_one_round_is_unknown() -> None:
    assert summarise_known_rounds([3.0, None]) is None
