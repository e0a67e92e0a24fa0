"""The benchmark's command line refuses what cannot work before anything is timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.benchmark import SUITES, main
from sppruner.errors import EngineError

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


def test_the_headline_alone_takes_no_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "engine", "--quick", "--methods", "fsr"]) == 2
    assert "--methods: --quick times the headline only" in capsys.readouterr().err


def test_dense_is_no_method_to_time_at_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "engine", "--shape", "tiny", "--methods", "fsr,none"]) == 2
    assert "--methods: none is timed always" in capsys.readouterr().err


def test_a_file_without_a_folder_is_refused_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--suite", "scale", "--json", str(tmp_path / "absent" / "x.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_an_error_of_the_library_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise EngineError("request 1: no answer")

    monkeypatch.setattr("jobs.benchmark.run_suite", fail)
    assert main(["--suite", "scale"]) == 1
    assert "benchmark: request 1: no answer" in capsys.readouterr().err
