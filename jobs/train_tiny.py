"""Train an embedded model from nothing: `python jobs/train_tiny.py --family llava --output DIR`.

About an hour on two CPU cores (longer for `--family qwen`), where the independent stages run side
by side; on a GPU one after another. With `--from FOLDER` only the joint training of a finished
model goes on. Killed at any moment, the same command continues from the checkpoints in the work
folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import structlog
import torch
from transformers.utils import logging as transformers_logging

from sppruner.tiny.recipe.cache import build_cache
from sppruner.tiny.recipe.card import write_card
from sppruner.tiny.recipe.families import FAMILIES
from sppruner.tiny.recipe.history import History
from sppruner.tiny.recipe.joint import joint_model
from sppruner.tiny.recipe.loop import load_checkpoint

__all__ = ["main"]

log = structlog.get_logger()
CPU = torch.device("cpu")


def run_together(commands: list[list[str]], environment: dict[str, str]) -> None:
    """Run processes side by side; when one fails, stop the others and exit with its status."""
    running = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        while any(process.poll() is None for process in running):
            failed = [process.returncode for process in running if process.returncode]
            if failed:
                raise SystemExit(failed[0])
            time.sleep(0.2)
        for process in running:
            if process.returncode:
                raise SystemExit(process.returncode)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
            process.wait()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="llava")
    parser.add_argument("--from", dest="start", type=Path, help="go on from this model folder")
    parser.add_argument("--work", type=Path, help="scenes and checkpoints [OUTPUT.work]")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="shorten or lengthen")
    parser.add_argument("--scenes", type=int, default=48_000, help="training scenes to render")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--save-seconds", type=float, default=60.0, help="between checkpoints")
    parser.add_argument("--evaluate-scenes", type=int, default=300)
    arguments = parser.parse_args(argv)
    start: Path | None = arguments.start
    if start is not None:
        if not (start / "training.json").is_file():
            parser.error(f"--from {start}: no training.json, give a folder that this command wrote")
        kind = json.loads((start / "config.json").read_text())["model_type"]
        if not kind.startswith(arguments.family):
            parser.error(f"--from {start} holds a {kind} model: choose its --family")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run all stages, then export, evaluate and write the model card."""
    arguments = parse(argv)
    work: Path = arguments.work or arguments.output.with_suffix(".work")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    log.info("scenes", folder=str(work / "scenes"), count=arguments.scenes)
    build_cache(work / "scenes", arguments.scenes)

    def worker(stage: str, *extra: str) -> list[str]:
        command = [sys.executable, "-m", "sppruner.tiny.recipe.worker", stage, *extra]
        command += ["--work", str(work), "--device", device, "--family", arguments.family]
        command += ["--steps-scale", str(arguments.steps_scale)]
        command += ["--save-seconds", str(arguments.save_seconds)]
        return [*command, "--no-compile"] if arguments.no_compile else command

    def both(stage: str, *extra: str) -> list[list[str]]:
        """A stage as two processes that share gradients."""
        rendezvous = (work / f"rendezvous-{uuid.uuid4().hex}").resolve()
        group = ["--world", "2", "--rendezvous", str(rendezvous), *extra]
        return [worker(stage, "--rank", str(rank), *group) for rank in range(2)]

    goes_on = [] if arguments.start is None else ["--start", str(arguments.start)]
    if device == "cpu":
        rounds = [[worker("language"), worker("vision")], both("sharpen"), both("joint", *goes_on)]
    else:
        rounds = [[worker(stage)] for stage in ("language", "vision", "sharpen")]
        rounds.append([worker("joint", *goes_on)])
    if goes_on:
        rounds = rounds[-1:]
    # Spinning OpenMP threads suffer badly on shared cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    for commands in rounds:
        run_together(commands, environment)

    transformers_logging.disable_progress_bar()
    family = FAMILIES[arguments.family]
    family.save(joint_model(family, work / "joint.pt"), arguments.output)
    log.info("saved", folder=str(arguments.output))

    def steps(stage: str) -> int:
        return int(load_checkpoint(work / f"{stage}.pt", CPU)["step"])

    if arguments.start is None:
        history = History(
            language=steps("language"),
            vision=steps("vision"),
            sharpen=steps("sharpen"),
            joint=steps("joint"),
        )
    else:
        history = History.read(arguments.start).continued(steps("joint"))
    history.write(arguments.output)
    write_card(family, arguments.output, arguments.evaluate_scenes)
    log.info("evaluated", card=str(arguments.output / "README.md"))


if __name__ == "__main__":
    main()
