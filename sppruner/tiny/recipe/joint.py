"""Stage J: both halves meet and are trained together on pixels.

On a CPU two single-thread ranks average their gradients, which is faster than two threads in one
process. Visual tokens are dropped uniformly at random in half of the steps, for no pruner's
benefit in particular; embeddings stay frozen.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor, distributed, nn
from transformers import LlavaForConditionalGeneration

from sppruner.tiny.model import build_model, build_tokenizer
from sppruner.tiny.recipe.contrast import CaptionContrast
from sppruner.tiny.recipe.language import kind_weights, sample_keep
from sppruner.tiny.recipe.loop import Draws, Schedule, load_checkpoint, run_steps
from sppruner.tiny.recipe.packing import answer_logits, lm_loss, pack
from sppruner.tiny.recipe.space import Truth
from sppruner.tiny.recipe.stages import Workshop
from sppruner.tiny.recipe.vision import DenseLoss, Eyes, pixels

__all__ = ["Ranks", "joint_model", "train_joint"]

_JOINT: Final = 3
_BATCH: Final = 24  # over all ranks


class Ranks:
    """Membership in a group of training processes that share gradients; one rank needs none."""

    def __init__(self, rank: int, world: int, rendezvous: Path | None) -> None:
        self.rank, self.world, self.rendezvous = rank, world, rendezvous

    def __enter__(self) -> Ranks:
        if self.world > 1:
            if self.rendezvous is None:
                raise ValueError("several ranks need a rendezvous file")
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{self.rendezvous.resolve()}",
                rank=self.rank,
                world_size=self.world,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.world > 1:
            distributed.destroy_process_group()

    def average(self, gradients: list[Tensor]) -> None:
        """Replace every gradient by its mean over ranks, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.world
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _parts(model: LlavaForConditionalGeneration, contrast: CaptionContrast) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"eyes": Eyes(model), "contrast": contrast, "language": model.model.language_model}
    )


def joint_model(checkpoint: Path) -> tuple[LlavaForConditionalGeneration, int]:
    """The model as of a checkpoint of this stage, float32 on the CPU, and the steps it took."""
    model = build_model(build_tokenizer())
    parts = _parts(model, CaptionContrast())
    state = load_checkpoint(checkpoint, torch.device("cpu"))
    parts.load_state_dict(state["model"])
    return model.eval(), state["step"]


def train_joint(shop: Workshop, ranks: Ranks) -> None:
    """Stage J, from the checkpoints of stages L and V."""
    model, space = shop.build()
    contrast = CaptionContrast().to(shop.device)
    parts = _parts(model, contrast)
    language = load_checkpoint(shop.folder / "language.pt", shop.device)
    vision = load_checkpoint(shop.folder / "vision.pt", shop.device)
    parts["language"].load_state_dict(language["model"])
    nn.ModuleDict({"eyes": parts["eyes"], "contrast": contrast}).load_state_dict(vision["model"])

    look = shop.compile(parts["eyes"])
    dense = DenseLoss(space)
    weights = kind_weights(shop.device, background=0.5, count=3.0, relation=2.0)
    batch = _BATCH // ranks.world

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        draws = Draws(stage=_JOINT, step=step, rank=ranks.rank)
        rng = draws.numpy()
        scenes = draws.scenes(len(shop.cache), batch, ranks.world)
        text = pack(shop.cache, scenes, rng, 0.75, shop.device)
        # All ranks drop equally many tokens, so that none waits for the other.
        keep = sample_keep(batch, Draws(stage=_JOINT, step=step).torch())
        with torch.autocast(shop.device.type, torch.bfloat16):
            tokens, pooled = look(pixels(shop.cache, scenes, shop.device))
            logits = answer_logits(model, tokens, text, keep)
        spoken = lm_loss(logits, text, weights)
        seen, numbers = dense(tokens, Truth(shop.cache, scenes, shop.device), 30.0)
        contrastive = contrast(pooled.float(), shop.cache, scenes, rng)
        right = (logits.argmax(-1) == text.labels_A).float().mean()
        numbers |= {"contrast": contrastive.item(), "lm": spoken.item(), "right": right.item()}
        return seen + 0.2 * contrastive + 4.0 * spoken, numbers

    run_steps(
        "joint",
        parts,
        Schedule(steps=shop.steps(2400), peak=8e-4, warmup=40, hold=0.25, floor=0.03),
        loss_at,
        shop.folder / "joint.pt",
        rank=ranks.rank,
        average=ranks.average,
        save_seconds=shop.save_seconds,
    )
