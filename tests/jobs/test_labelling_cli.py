"""The frozen command line: its options and defaults, and the arguments it refuses at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.config import RunConfig
from cluster.runs.run import fleet_settings
from cluster.serving.engine_settings import VLLM
from jobs import answer_vqa, caption_corpus, evaluate, make_corpus, report
from jobs.labelling_cli import Job, build_config, build_parser

JOBS = [caption_corpus.JOB, answer_vqa.JOB]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.kind)
def test_options_and_defaults_are_the_documented_ones(job: Job) -> None:
    options = {
        action.option_strings[0]: action.default
        for action in build_parser(job)._actions
        if action.dest != "help"
    }
    assert options == {
        "--input": None,
        "--output": None,
        "--model": "tiny-llava",
        "--method": "sppruner",
        "--retain": 0.222,
        "--auto": False,
        "--image-column": None,
        "--key": None,
        **({"--question-column": None} if job.kind == "vqa" else {}),
        "--prompt": job.prompt,
        "--max-new-tokens": job.max_new_tokens,
        "--format": None,
        "--dotted-keys": False,
        "--limit": None,
        "--dtype": "auto",
        "--engine": None,
        "--engine-option": [],
        "--replicas": 1,
        "--retry-errors": None,
        "--control-blocks": None,
        "--max-error-share": 0.2,
    }


def test_options_reach_the_replicas_and_their_requests() -> None:
    options = ["--input", "in", "--output", "out", "--dtype", "bfloat16", "--max-new-tokens", "7"]
    config = build_config(
        JOBS[0],
        build_parser(JOBS[0]).parse_args([*options, "--replicas", "3", "--max-error-share", "1"]),
        demo=False,
    )
    assert config.max_error_share == 1.0
    assert config.generation.max_new_tokens == 7
    fleet = fleet_settings(config, "r", {})
    assert (fleet.engine.dtype, fleet.engine.revision, fleet.replicas) == ("bfloat16", "r", 3)
    assert fleet.engine.slots is None


def test_options_of_an_engine_reach_its_replicas_and_are_part_of_the_run() -> None:
    options = ["--input", "in", "--output", "out", "--engine", "vllm"]
    options += ["--engine-option", "tensor_parallel_size=2", "--engine-option", "quantization=fp8"]
    config = build_config(JOBS[0], build_parser(JOBS[0]).parse_args(options), demo=False)
    engine = fleet_settings(config, "r", {}).engine
    assert engine.engine == VLLM
    assert engine.options == {"tensor_parallel_size": 2, "quantization": "fp8"}
    identity = config.identity()
    assert identity["engine_options"] == dict(engine.options)
    assert RunConfig.of_identity(identity, output="out").engine_options == dict(engine.options)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a job run in this process; starting Ray or a server would take far longer."""
    assert caption_corpus.main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "spruner"], "there are none, "),
        (["--retain", "22.2"], "outside (0, 1]"),
        (["--limit", "0"], "give at least 1"),
        (["--max-new-tokens", "0"], "give at least 1"),
        (["--replicas", "0"], "give at least 1"),
        (["--max-error-share", "20"], "give a share from 0 to 1"),
        (["--model", "no/such-model"], "not a local folder"),
        (["--engine", "vllm"], "vLLM is not installed here"),
        (["--engine-option", "quantization=fp8"], "goes with --engine vllm"),
        (["--engine", "vllm", "--engine-option", "quantization"], "write NAME=VALUE"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(
    extra: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert message in refused([*places, *extra], capsys)
    assert not (tmp_path / "out").exists()


def test_input_without_output_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give both --input and --output" in refused(["--input", "s3://corpus/x"], capsys)


@pytest.mark.parametrize("option", ["--input", "--output"])
def test_a_relative_path_of_a_submitted_job_is_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leads into a copy of the working directory that Ray removes."""
    places = {"--input": "/mnt/corpus", "--output": "s3://bucket/out"} | {option: "data/it"}
    arguments = [word for pair in places.items() for word in pair]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert f"{option} data/it: a submitted job runs in a temporary folder" in refused(
        arguments, capsys
    )


def test_a_bad_limit_of_the_demonstration_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--limit -5: give at least 1" in refused(["--limit", "-5"], capsys)


@pytest.mark.parametrize("flag", ["--input", "--output", "--model", "--prompt"])
def test_an_empty_value_is_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"--input": "in", "--output": "out", flag: ""}
    assert f"{flag} is empty" in refused([part for pair in places.items() for part in pair], capsys)


def test_a_prompt_that_leaves_out_the_question_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert answer_vqa.main(["--prompt", "Answer in French."]) == 2
    assert "write {question}" in capsys.readouterr().err


def test_control_blocks_of_a_dense_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--input", "in", "--output", "out", "--model", "m", "--prompt", "p"]
    said = refused([*places, "--method", "none", "--control-blocks", "5"], capsys)
    assert "--control-blocks 5: a dense run has nothing to compare" in said


def test_a_bad_log_format_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPPRUNER_LOG_FORMAT", "xml")
    assert "SPPRUNER_LOG_FORMAT" in refused([], capsys)


@pytest.mark.parametrize("place", ["/dev/null", "/etc/passwd/x"])
def test_an_output_that_can_be_no_folder_is_a_usage_error(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"usage: {place} can never be a folder"
    assert message in refused(["--input", str(tmp_path), "--output", place], capsys)
    assert make_corpus.main(["--kind", "vqa", "--rows", "3", "--output", place]) == 2
    assert f"{place} can never be a folder" in capsys.readouterr().err


def test_an_empty_corpus_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert str(tmp_path / "in") in refused(places, capsys)


def test_a_report_of_a_prefix_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_evaluate_lists_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--methods", "nope", "--model", "unused"]) == 2
    assert "sppruner" in capsys.readouterr().err


def test_a_report_that_cannot_be_shown_fails_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A closed pipe, a summary of odd figures: the rows are committed all the same."""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such figure")

    outcome = SimpleNamespace(summary=None, note=None, exit_code=3)
    monkeypatch.setattr("cluster.runs.run.run", lambda *_, **__: outcome)
    monkeypatch.setattr("cluster.report.terminal.print_report", fail)
    assert caption_corpus.main(["--input", "in", "--output", "labels"]) == 3
    message = "cannot be shown (ValueError: no such figure): python jobs/report.py labels"
    assert message in capsys.readouterr().err
