"""The training command resumes after `kill -9` and writes a loadable model with a card."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from jobs import train_tiny
from jobs.training import worker
from jobs.training.history import History
from jobs.training.loop import load_checkpoint, save_checkpoint
from sppruner.models.loading import EMBEDDED
from sppruner.tiny import TINY_MODELS

REPOSITORY = Path(__file__).resolve().parents[3]


def _start(output: Path, *more: str) -> subprocess.Popen[str]:
    options = "--steps-scale 0.004 --scenes 60 --evaluate-scenes 4 --save-seconds 0"
    command = [sys.executable, "jobs/train_tiny.py", "--output", str(output), "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--no-compile", *options.split(), *more],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_resumes_after_a_kill(tmp_path: Path) -> None:
    output = tmp_path / "model"
    work = tmp_path / "model.work"
    first = _start(output)
    try:
        while first.poll() is None and not (work / "vision.pt").exists():
            time.sleep(0.05)
    finally:
        # The whole process group at once, like a machine that loses power.
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert load_checkpoint(work / "vision.pt", torch.device("cpu"))["step"] > 0
    assert not output.exists()

    second = _start(output)
    try:
        log, _ = second.communicate(timeout=600)
    finally:
        second.kill()
    assert second.returncode == 0, log
    assert "resumed" in log
    assert load_checkpoint(work / "joint.pt", torch.device("cpu"))["step"] == 8
    AutoProcessor.from_pretrained(output)
    LlavaForConditionalGeneration.from_pretrained(output)
    card = (output / "README.md").read_text()
    assert "| existence |" in card


@pytest.mark.parametrize(
    ("start", "message"),
    [("nowhere", "holds no training.json"), (str(TINY_MODELS[EMBEDDED]), "holds a llava model")],
)
def test_a_folder_that_cannot_be_continued_is_refused_before_any_work(
    start: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    with pytest.raises(SystemExit):
        train_tiny.main(["--from", start, "--family", "qwen", "--output", str(output)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The files that the command checks before it starts any work."""
    folder = tmp_path / "finished"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    History(language=1, vision=1, sharpen=1, joint=1).write(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", "{", "names no model_type"),
        ("config.json", "{}", "names no model_type"),
        ("model.safetensors", None, "holds no model.safetensors"),
        ("training.json", None, "holds no training.json"),
        ("training.json", "{}", "tells no history"),
    ],
)
def test_an_unfinished_folder_is_refused_before_any_work(
    file: str, content: str | None, message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        (finished / file).unlink()
    else:
        (finished / file).write_text(content)
    with pytest.raises(SystemExit):
        train_tiny.main(["--from", str(finished), "--output", str(finished.parent / "model")])
    assert message in capsys.readouterr().err
    assert [path.name for path in finished.parent.iterdir()] == ["finished"]


@pytest.mark.parametrize("alias", ["finished", "work/../finished", "link"])
def test_a_continuation_does_not_overwrite_what_it_starts_from(
    alias: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished.parent / "work").mkdir()
    (finished.parent / "link").symlink_to(finished)
    with pytest.raises(SystemExit):
        train_tiny.main(["--from", str(finished), "--output", str(finished.parent / alias)])
    assert "give another" in capsys.readouterr().err


def test_the_work_folder_has_the_full_name_of_the_output() -> None:
    def work(*options: str) -> Path:
        folder: Path = train_tiny.parse_arguments(list(options)).work
        return folder

    assert work("--output", "models/v1.0") == Path("models/v1.0.work")
    assert work("--output", "models/v1.1") == Path("models/v1.1.work")
    assert work("--output", "models/v1.1", "--work", "here") == Path("here")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_the_joint_stage_continues_from_a_model(device: str, finished: Path) -> None:
    def stages(*options: str) -> list[list[str]]:
        arguments = train_tiny.parse_arguments(["--output", "model", *options])
        rounds = train_tiny.plan_stages(arguments, device)
        for command in (command for commands in rounds for command in commands):
            assert ("--start" in command) == bool(options)
        return [[command[3] for command in commands] for commands in rounds]

    joint = ["joint", "joint"] if device == "cpu" else ["joint"]
    assert stages("--from", str(finished)) == [joint]
    assert stages() == (
        [["language", "vision"], ["sharpen", "sharpen"], joint]
        if device == "cpu"
        else [["language"], ["vision"], ["sharpen"], joint]
    )


@pytest.mark.parametrize("stage", ["language", "vision", "sharpen"])
def test_a_stage_that_does_not_start_from_a_model_refuses_one(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["worker", stage, "--work", "w", "--start", "m"])
    with pytest.raises(SystemExit):
        worker.main()
    assert "--start is for stage joint" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_joint_training_continues_from_the_shipped_weights_and_records_it(tmp_path: Path) -> None:
    # The finished joint stage in the work folder belongs to another run.
    work = tmp_path / "work"
    work.mkdir()
    save_checkpoint(work / "joint.pt", {"model": {}, "optimizers": [], "step": 2000})
    start = ["--from", str(TINY_MODELS[EMBEDDED]), "--work", str(work)]
    again = _start(tmp_path / "model", *start)
    try:
        log, _ = again.communicate(timeout=600)
    finally:
        again.kill()
    assert again.returncode == 0, log
    shipped, made = TINY_MODELS[EMBEDDED], tmp_path / "model"
    before, after = History.read(shipped), History.read(made)
    assert after == before.continued(8)
    assert f"went on for {after.again:,} steps" in (made / "README.md").read_text()
    old, new = (load_file(folder / "model.safetensors") for folder in (shipped, made))
    assert old.keys() == new.keys()
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert moved
    assert all((old[name] - new[name]).abs().max() < 0.2 for name in old)
