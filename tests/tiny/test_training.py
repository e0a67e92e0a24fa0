"""The training command survives `kill -9` and ends in a loadable, described model."""

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
from sppruner.engine.loading import EMBEDDED
from sppruner.tiny import TINY_MODELS
from sppruner.tiny.recipe.history import History
from sppruner.tiny.recipe.loop import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


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
        # The whole group at once, as a machine that loses power would.
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
    [("nowhere", "no training.json"), (str(TINY_MODELS[EMBEDDED]), "holds a llava model")],
)
def test_what_cannot_be_trained_on_is_refused_before_any_work(
    start: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    with pytest.raises(SystemExit):
        train_tiny.main(["--from", start, "--family", "qwen", "--output", str(output)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_joint_training_goes_on_from_the_shipped_weights_and_says_so(tmp_path: Path) -> None:
    again = _start(tmp_path / "model", "--from", str(TINY_MODELS[EMBEDDED]))
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
