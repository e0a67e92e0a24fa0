"""The stages before the joint one: each builds, trains and checkpoints its part in a work folder.

`language` and `vision` are independent; `sharpen` continues `vision` on several ranks. Shipped
weights may have taken other numbers of steps than these stages; `training.json` beside them tells.
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
from jobs.training.language import init_language, language_loss
from jobs.training.loop import Draws, LearningRateSchedule, load_checkpoint, run_steps
from jobs.training.ranks import Ranks
from jobs.training.scene_cache import SceneCache
from jobs.training.space import TokenSpace, Truth
from jobs.training.vision import DenseLoss, pixels

__all__ = ["Workshop", "sharpen_vision", "train_language", "train_vision"]

_VISION: Final = 2
_SHARPEN: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What every stage needs: the data, the device and the folder for checkpoints."""

    folder: Path
    cache: SceneCache
    device: torch.device
    family: Family = LLAVA
    start: Path | None = None  # a model folder whose joint training goes on
    scale: float = 1.0  # of all step counts
    compiled: bool = True
    save_seconds: float = 60.0  # between checkpoints

    def steps(self, full: int) -> int:
        """A stage's step count at this scale."""
        return max(2, round(full * self.scale))

    def build(self) -> tuple[Any, TokenSpace]:
        """The initialised model, embeddings frozen at the token space."""
        tokenizer: PreTrainedTokenizerFast = self.family.tokenizer()
        space = TokenSpace(tokenizer, self.device)
        model = self.family.build(tokenizer)
        init_language(model, space)
        self.family.init_vision(model, self.cache)
        return model.to(self.device), space

    def compile(self, module: nn.Module) -> Callable[..., Any]:
        """Compile a module whose shapes never change."""
        return torch.compile(module, dynamic=False) if self.compiled else module


def train_language(shop: Workshop) -> None:
    """Stage L, in one process."""
    model, space = shop.build()
    batch = 16
    schedule = LearningRateSchedule(steps=shop.steps(2600), peak=2e-3, warmup=100, hold=0.5)
    run_steps(
        "language",
        model.model.language_model,
        schedule,
        language_loss(shop.family, model, space, shop.cache, schedule.steps, batch),
        shop.folder / "language.pt",
        save_seconds=shop.save_seconds,
    )


def train_vision(shop: Workshop) -> None:
    """Stage V, beside stage L on another core."""
    schedule = LearningRateSchedule(steps=shop.steps(1500), peak=1.5e-3, warmup=100, floor=0.08)
    _look_and_tell(shop, Ranks(0, 1, None), "vision", schedule, 16)


def sharpen_vision(shop: Workshop, ranks: Ranks) -> None:
    """Stage S: the vision tower again, on all ranks, for what it learns last."""
    schedule = LearningRateSchedule(steps=shop.steps(400), peak=1.2e-3, warmup=50, floor=0.15)
    _look_and_tell(shop, ranks, "sharpen", schedule, 32 // ranks.world)


def _look_and_tell(
    shop: Workshop, ranks: Ranks, name: str, schedule: LearningRateSchedule, batch: int
) -> None:
    model, space = shop.build()
    torch.manual_seed(23)
    eyes, contrast = shop.family.eyes(model), CaptionContrast().to(shop.device)
    parts = nn.ModuleDict({"eyes": eyes, "contrast": contrast})
    sharp = name == "sharpen"
    if sharp:
        parts.load_state_dict(load_checkpoint(shop.folder / "vision.pt", shop.device)["model"])
    look = shop.compile(eyes)
    dense = DenseLoss(space, sharp=sharp)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        draws = Draws(stage=_SHARPEN if sharp else _VISION, step=step, rank=ranks.rank)
        scenes = draws.scenes(len(shop.cache), batch, ranks.world)
        with torch.autocast(shop.device.type, torch.bfloat16):
            tokens, pooled = look(pixels(shop.cache, scenes, shop.device))
        # The full-token error counts more and more: the language model expects oracle tokens.
        mse_weight = 25.0 if sharp else 5.0 + 20.0 * step / schedule.steps
        loss, numbers = dense(tokens, Truth(shop.cache, scenes, shop.device), mse_weight)
        contrastive = contrast(pooled.float(), shop.cache, scenes, draws.numpy())
        numbers |= {"contrast": contrastive.item()}
        return loss + (0.1 if sharp else 0.3) * contrastive, numbers

    run_steps(
        name,
        parts,
        schedule,
        loss_at,
        shop.folder / f"{name}.pt",
        rank=ranks.rank,
        average=ranks.average,
        save_seconds=shop.save_seconds,
    )
