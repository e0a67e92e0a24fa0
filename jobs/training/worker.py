"""One training process: `python -m jobs.training.worker STAGE --work DIR`.

`jobs/train_tiny.py` starts the workers; one whose stage is complete returns immediately.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import structlog
import torch

from jobs.training.families import FAMILIES
from jobs.training.joint import train_joint
from jobs.training.ranks import Ranks
from jobs.training.scene_cache import SceneCache
from jobs.training.stages import TrainingContext, sharpen_vision, train_language, train_vision

__all__: list[str] = []


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one training stage.")
    parser.add_argument("stage", choices=("language", "vision", "sharpen", "joint"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="llava")
    parser.add_argument("--start", type=Path, help="joint: continue from this model folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps-scale", type=float, default=1.0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--rendezvous", type=Path, help="a new file path shared by all ranks")
    arguments = parser.parse_args()
    if arguments.start is not None and arguments.stage != "joint":
        parser.error(
            f"--start is for stage joint: {arguments.stage} does not start from a model folder"
        )
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "stage", "event"]),
        ]
    )
    torch.set_num_threads(1)
    context = TrainingContext(
        folder=arguments.work,
        cache=SceneCache.load(arguments.work / "scenes"),
        device=torch.device(arguments.device),
        family=FAMILIES[arguments.family],
        start=arguments.start,
        scale=arguments.steps_scale,
        compiled=not arguments.no_compile,
        save_seconds=arguments.save_seconds,
    )
    if arguments.stage == "language":
        train_language(context)
    elif arguments.stage == "vision":
        train_vision(context)
    else:
        with Ranks(arguments.rank, arguments.world, arguments.rendezvous) as ranks:
            (sharpen_vision if arguments.stage == "sharpen" else train_joint)(context, ranks)


if __name__ == "__main__":
    main()
