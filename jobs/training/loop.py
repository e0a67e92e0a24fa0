"""The training loop of every stage: schedule, optimizers, atomic checkpoints, exact resume.

Every random draw is a function of (stage, step, rank) only, so a killed run resumes from its last
checkpoint with the data it would have used.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from jobs.training.optimizers import build_optimizers
from jobs.training.scene_cache import Array

__all__ = ["Draws", "LearningRateSchedule", "load_checkpoint", "run_steps", "save_checkpoint"]

_LOG_STEPS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSchedule:
    """Linear warm-up, then constant, then cosine decay."""

    steps: int
    """Steps of the stage."""
    peak: float
    """Highest learning rate."""
    warmup: int
    """Steps of the linear warm-up."""
    hold: float = 0.0
    """Share of the steps after which the decay starts."""
    floor: float = 0.05
    """Final learning rate as a share of the peak."""

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = max(0.0, step / max(1, self.steps) - self.hold) / (1 - self.hold)
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The random draws of one step on one rank."""

    stage: int
    """Number of the stage; stages have independent draws."""
    step: int
    """Step within the stage, from 0."""
    rank: int = 0
    """Rank of the process."""

    def numpy(self) -> np.random.Generator:
        """Generator for index and question choices."""
        return np.random.default_rng([self.stage, self.step, self.rank])

    def torch(self) -> torch.Generator:
        """Generator (on the CPU) for noise and token choices."""
        state = np.random.SeedSequence([self.stage, self.step, self.rank, 1]).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))

    def scenes(self, total: int, batch: int, world: int = 1) -> Array:
        """The scenes of this batch: each epoch is a new permutation, split among the ranks."""
        first = (self.step * world + self.rank) * batch
        places = np.arange(first, first + batch)
        return np.array([_permute(self.stage, int(p // total), total)[p % total] for p in places])


@lru_cache(maxsize=2)
def _permute(stage: int, epoch: int, total: int) -> Array:
    return np.random.default_rng([stage, epoch]).permutation(total)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces the file atomically: after a kill it is the old checkpoint or the new one."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Reads a checkpoint of `save_checkpoint`."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def run_steps(
    name: str,
    trained: nn.Module,
    schedule: LearningRateSchedule,
    loss_at: Callable[[int], tuple[Tensor, dict[str, float]]],
    checkpoint: Path,
    *,
    rank: int = 0,
    average: Callable[[list[Tensor]], None] | None = None,
    save_seconds: float = 60.0,
) -> None:
    """Trains `trained` to the end of its schedule, resuming from `checkpoint` if it exists.

    `loss_at(step)` returns the loss and figures to log; `average` makes gradients equal on all
    ranks. Only rank 0 writes checkpoints, every `save_seconds` and at the end.
    """
    log = structlog.get_logger().bind(stage=name, rank=rank)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizers = build_optimizers(trained)
    first = 0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, parameters[0].device)
        trained.load_state_dict(state["model"])
        for optimizer, known in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(known)
        first = state["step"]
        log.info("resumed", step=first, of=schedule.steps)

    def save(step: int) -> None:
        if rank == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": trained.state_dict(), "optimizers": states, "step": step}
            save_checkpoint(checkpoint, state)

    trained.train()
    started = saved = time.monotonic()
    for step in range(first, schedule.steps):
        for group in chain.from_iterable(o.param_groups for o in optimizers):
            group["lr"] = schedule.rate(step)
        loss, numbers = loss_at(step)
        trained.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if average is not None:
            average(gradients)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        now = time.monotonic()
        if rank == 0 and (step + 1) % _LOG_STEPS == 0:
            left = (now - started) / (step + 1 - first) * (schedule.steps - step - 1)
            rounded = {key: round(value, 3) for key, value in numbers.items()}
            log.info(
                "step", step=step + 1, of=schedule.steps, eta_minutes=round(left / 60, 1), **rounded
            )
        if now - saved > save_seconds:
            save(step + 1)
            saved = now
    if first < schedule.steps:
        save(schedule.steps)
    log.info("finished", steps=schedule.steps, minutes=round((time.monotonic() - started) / 60, 1))
