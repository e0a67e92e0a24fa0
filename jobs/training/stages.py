"""The stages before the joint stage: each builds, trains and checkpoints its part in a work folder.

`language` and `vision` are independent; `sharpen` continues `vision` on several ranks. The shipped
weights may have other step counts than these stages: `training.json` beside them records theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from jobs.training.contrast import CaptionContrast
from jobs.training.families import LLAVA, Family
from jobs.training.language import build_language_loss, init_language
from jobs.training.loop import Draws, LearningRateSchedule, load_checkpoint, run_steps
from jobs.training.ranks import Ranks
from jobs.training.scene_cache import SceneCache
from jobs.training.space import PatchTruth, TokenSpace
from jobs.training.vision import DenseLoss, normalise_images

__all__ = ["ENCODER_KEY", "TrainingContext", "sharpen_vision", "train_language", "train_vision"]

ENCODER_KEY: Final = "eyes"
"""Key of the vision encoder in checkpoints; it stays as it is so that older checkpoints resume."""

_VISION: Final = 2
_SHARPEN: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingContext:
    """Settings that all stages share."""

    folder: Path
    """Folder of the checkpoints."""
    cache: SceneCache
    """Training scenes."""
    device: torch.device
    """Device that trains."""
    family: Family = LLAVA
    """Architecture."""
    start: Path | None = None
    """Model folder whose joint training continues; None: all stages from scratch."""
    scale: float = 1.0
    """Factor on all step counts."""
    compiled: bool = True
    """Whether modules are compiled."""
    save_seconds: float = 60.0
    """Seconds between checkpoints."""

    def steps(self, full: int) -> int:
        """A stage's step count at this scale, at least 2."""
        return max(2, round(full * self.scale))

    def build(self) -> tuple[Any, TokenSpace]:
        """The initialised model, with embeddings frozen at the token space, and the space."""
        tokenizer: PreTrainedTokenizerFast = self.family.tokenizer()
        space = TokenSpace(tokenizer, self.device)
        model = self.family.build(tokenizer)
        init_language(model, space)
        self.family.init_vision(model, self.cache)
        return model.to(self.device), space

    def compile(self, module: nn.Module) -> Callable[..., Any]:
        """Compiles a module whose shapes never change."""
        return torch.compile(module, dynamic=False) if self.compiled else module


def train_language(context: TrainingContext) -> None:
    """Trains stage L, in one process."""
    model, space = context.build()
    batch = 16
    schedule = LearningRateSchedule(steps=context.steps(2600), peak=2e-3, warmup=100, hold=0.5)
    run_steps(
        "language",
        model.model.language_model,
        schedule,
        build_language_loss(context.family, model, space, context.cache, schedule.steps, batch),
        context.folder / "language.pt",
        save_seconds=context.save_seconds,
    )


def train_vision(context: TrainingContext) -> None:
    """Trains stage V, in one process; it may run beside stage L on another core."""
    schedule = LearningRateSchedule(steps=context.steps(1500), peak=1.5e-3, warmup=100, floor=0.08)
    _train_vision_stage(context, Ranks(0, 1, None), "vision", schedule, 16)


def sharpen_vision(context: TrainingContext, ranks: Ranks) -> None:
    """Trains stage S, on all ranks: the vision tower again, for what it learns last."""
    schedule = LearningRateSchedule(steps=context.steps(400), peak=1.2e-3, warmup=50, floor=0.15)
    _train_vision_stage(context, ranks, "sharpen", schedule, 32 // ranks.world)


def _train_vision_stage(
    context: TrainingContext, ranks: Ranks, name: str, schedule: LearningRateSchedule, batch: int
) -> None:
    model, space = context.build()
    torch.manual_seed(23)
    encoder = context.family.build_vision_encoder(model)
    contrast = CaptionContrast().to(context.device)
    parts = nn.ModuleDict({ENCODER_KEY: encoder, "contrast": contrast})
    sharp = name == "sharpen"
    if sharp:
        parts.load_state_dict(
            load_checkpoint(context.folder / "vision.pt", context.device)["model"]
        )
    encode = context.compile(encoder)
    dense = DenseLoss(space, sharp=sharp)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        draws = Draws(stage=_SHARPEN if sharp else _VISION, step=step, rank=ranks.rank)
        scenes = draws.scenes(len(context.cache), batch, ranks.world)
        with torch.autocast(context.device.type, torch.bfloat16):
            tokens, pooled = encode(normalise_images(context.cache, scenes, context.device))
        # The weight of the full-token error grows: the language model expects oracle tokens.
        mse_weight = 25.0 if sharp else 5.0 + 20.0 * step / schedule.steps
        loss, numbers = dense(tokens, PatchTruth(context.cache, scenes, context.device), mse_weight)
        contrastive = contrast(pooled.float(), context.cache, scenes, draws.numpy())
        numbers |= {"contrast": contrastive.item()}
        return loss + (0.1 if sharp else 0.3) * contrastive, numbers

    run_steps(
        name,
        parts,
        schedule,
        loss_at,
        context.folder / f"{name}.pt",
        rank=ranks.rank,
        average=ranks.average,
        save_seconds=context.save_seconds,
    )
