"""Trains an embedded model from scratch: `python jobs/train_tiny.py --family llava --output DIR`.

On a CPU the independent stages run side by side, on a GPU one after another. With `--from FOLDER`
only the joint training of a finished model continues. After a kill the same command resumes from
the checkpoints in the work folder. The shipped LLaVA weights had more vision steps than this
command runs (their model card has the history); the scores of a LLaVA from this command were not
measured.
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

from jobs.boundary import end_with, run_command
from jobs.training.card import write_card
from jobs.training.families import FAMILIES
from jobs.training.history import History
from jobs.training.joint import load_joint_model, locate_joint_checkpoint
from jobs.training.loop import load_checkpoint
from jobs.training.scene_cache import build_cache
from sppruner.errors import UnsupportedModel

__all__ = ["main"]

log = structlog.get_logger()
CPU = torch.device("cpu")


def run_together(commands: list[list[str]], environment: dict[str, str]) -> None:
    """Runs processes side by side; if one fails, stops the others and exits with its status."""
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument(
        "--family", choices=tuple(FAMILIES), default="llava", help="architecture (%(default)s)"
    )
    parser.add_argument(
        "--from", dest="start", type=Path, help="continue the joint training of this model folder"
    )
    parser.add_argument("--work", type=Path, help="folder for scenes and checkpoints (OUTPUT.work)")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="factor on all step counts (%(default)s)"
    )
    parser.add_argument(
        "--scenes", type=int, default=48_000, help="training scenes to render (%(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto is a GPU if there is one (%(default)s)",
    )
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument(
        "--save-seconds", type=float, default=60.0, help="seconds between checkpoints (%(default)s)"
    )
    parser.add_argument(
        "--evaluate-scenes",
        type=int,
        default=300,
        help="held-out scenes of the model card (%(default)s)",
    )
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; `work` gets its default."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name in ("scenes", "evaluate_scenes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give at least 1")
    start: Path | None = arguments.start
    if start is not None:
        if arguments.output.resolve() == start.resolve():
            parser.error(
                "--output is the folder of --from, which must not be overwritten: give another"
            )
        try:
            kind = _read_model_type(start)
        except UnsupportedModel as error:
            parser.error(f"--from: {error}")
        if not kind.startswith(arguments.family):
            parser.error(f"--from {start} holds a {kind} model: choose its --family")
    if arguments.work is None:
        arguments.work = arguments.output.with_name(f"{arguments.output.name}.work")
    return arguments


def _read_model_type(start: Path) -> str:
    """Model type of a folder that this command wrote. Raises UnsupportedModel for any other."""
    History.read(start)
    for name in ("config.json", "model.safetensors"):
        if not (start / name).is_file():
            raise UnsupportedModel(f"{start} holds no {name}: give a folder that train_tiny wrote")
    try:
        return str(json.loads((start / "config.json").read_text())["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"{start / 'config.json'} names no model_type: give a folder that train_tiny wrote"
        ) from error


def plan_stages(arguments: argparse.Namespace, device: str) -> list[list[list[str]]]:
    """Worker commands of the stages: rounds in sequence, the commands of a round together."""

    def worker(stage: str, *extra: str) -> list[str]:
        command = [sys.executable, "-m", "jobs.training.worker", stage, *extra]
        command += ["--work", str(arguments.work), "--device", device]
        command += ["--family", arguments.family, "--steps-scale", str(arguments.steps_scale)]
        command += ["--save-seconds", str(arguments.save_seconds)]
        return [*command, "--no-compile"] if arguments.no_compile else command

    def data_parallel(stage: str, *extra: str) -> list[list[str]]:
        """Commands of one stage: on a CPU two processes that share gradients."""
        if device != "cpu":
            return [worker(stage, *extra)]
        rendezvous = (arguments.work / f"rendezvous-{uuid.uuid4().hex}").resolve()
        group = ["--world", "2", "--rendezvous", str(rendezvous), *extra]
        return [worker(stage, "--rank", str(rank), *group) for rank in range(2)]

    if arguments.start is not None:
        return [data_parallel("joint", "--start", str(arguments.start))]
    independent = [worker("language"), worker("vision")]
    first = [independent] if device == "cpu" else [[command] for command in independent]
    return [*first, data_parallel("sharpen"), data_parallel("joint")]


def main(argv: list[str] | None = None) -> int:
    """Runs all stages, then exports and evaluates the model and writes its card."""
    arguments = parse_arguments(argv)
    return run_command(lambda: _train(arguments), argv, left="the same command resumes")


def _train(arguments: argparse.Namespace) -> int:
    work: Path = arguments.work
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    log.info("scenes", folder=str(work / "scenes"), count=arguments.scenes)
    build_cache(work / "scenes", arguments.scenes)
    # On shared cores, spinning OpenMP threads slow each other down.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    for commands in plan_stages(arguments, device):
        run_together(commands, environment)

    transformers_logging.disable_progress_bar()
    family = FAMILIES[arguments.family]
    joint = locate_joint_checkpoint(work, arguments.start)
    family.save(load_joint_model(family, joint), arguments.output)
    log.info("saved", folder=str(arguments.output))

    def read_steps(checkpoint: Path) -> int:
        return int(load_checkpoint(checkpoint, CPU)["step"])

    if arguments.start is None:
        history = History(
            language=read_steps(work / "language.pt"),
            vision=read_steps(work / "vision.pt"),
            sharpen=read_steps(work / "sharpen.pt"),
            joint=read_steps(joint),
        )
    else:
        history = History.read(arguments.start).continued(read_steps(joint))
    history.write(arguments.output)
    write_card(family, arguments.output, arguments.evaluate_scenes)
    log.info("evaluated", card=str(arguments.output / "README.md"))
    return 0


if __name__ == "__main__":
    end_with(main)
