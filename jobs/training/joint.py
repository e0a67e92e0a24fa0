"""Stage J: both halves meet and are trained together on pixels.

Visual tokens are dropped uniformly at random in half of the steps, for no pruner's benefit in
particular; questions about things that then no token shows are not trained on. Embeddings stay
frozen. The dense losses fade out over the first two thirds: what the visual tokens say in the end
is what answering needs, not what `space` prescribes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from jobs.training.contrast import CaptionContrast
from jobs.training.families import Family
from jobs.training.history import History
from jobs.training.language import kind_weights, sample_keep
from jobs.training.loop import Draws, LearningRateSchedule, load_checkpoint, run_steps
from jobs.training.packing import answer_logits, lm_loss, pack, shown_entities
from jobs.training.ranks import Ranks
from jobs.training.space import Truth
from jobs.training.stages import Workshop
from jobs.training.vision import DenseLoss, pixels

__all__ = ["joint_checkpoint", "joint_model", "train_joint"]

_JOINT: Final = 3
_BATCH: Final = 24  # over all ranks
_FADE: Final = 2 / 3  # of the steps, over which the dense losses fade out to nothing


def _parts(family: Family, model: Any, contrast: CaptionContrast) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"eyes": family.eyes(model), "contrast": contrast, "language": model.model.language_model}
    )


def joint_checkpoint(work: Path, start: Path | None) -> Path:
    """Where the stage keeps its state: one file for each model folder that it goes on from.

    Named by the weights, so that no other training's checkpoint is taken for this one's.
    """
    if start is None:
        return work / "joint.pt"
    weights = hashlib.sha256((start / "model.safetensors").read_bytes())
    return work / f"joint-from-{weights.hexdigest()[:16]}.pt"


def joint_model(family: Family, checkpoint: Path) -> Any:
    """The model as of a checkpoint of this stage, float32 on the CPU."""
    model = family.build(family.tokenizer())
    parts = _parts(family, model, CaptionContrast())
    state = load_checkpoint(checkpoint, torch.device("cpu"))
    parts.load_state_dict(state["model"])
    return model.eval()


def train_joint(shop: Workshop, ranks: Ranks) -> None:
    """Stage J, from the checkpoints of the stages before it.

    From a finished model (`shop.start`) the stage goes on as it ended: without dense losses, and
    with a new caption tower, since a model folder does not keep that. It draws on from where the
    joint training before it ended: the first batches would be those trained on already.
    """
    model, space = shop.build()
    contrast = CaptionContrast().to(shop.device)
    parts = _parts(shop.family, model, contrast)
    if shop.start is None:
        language = load_checkpoint(shop.folder / "language.pt", shop.device)
        vision = load_checkpoint(shop.folder / "sharpen.pt", shop.device)
        seen = nn.ModuleDict({"eyes": parts["eyes"], "contrast": contrast})
        parts["language"].load_state_dict(language["model"])
        seen.load_state_dict(vision["model"])
        done = 0
    else:
        known = AutoModelForImageTextToText.from_pretrained(shop.start, dtype=torch.float32)
        model.load_state_dict(known.state_dict())
        done = History.read(shop.start).joint_steps

    look = shop.compile(parts["eyes"])
    dense = DenseLoss(space, sharp=True)
    weights = kind_weights(shop.device, background=0.5, behind=2.0, count=3.0, nearest=4.0)
    batch = _BATCH // ranks.world
    schedule = LearningRateSchedule(
        steps=shop.steps(2000), peak=1e-3, warmup=40, hold=0.35, floor=0.03
    )

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        draws = Draws(stage=_JOINT, step=done + step, rank=ranks.rank)
        rng = draws.numpy()
        scenes = draws.scenes(len(shop.cache), batch, ranks.world)
        text = pack(shop.cache, scenes, rng, 0.75, shop.device)
        # All ranks drop equally many tokens, so that none waits for the other.
        keep = sample_keep(batch, Draws(stage=_JOINT, step=done + step).torch())
        with torch.autocast(shop.device.type, torch.bfloat16):
            tokens, pooled = look(pixels(shop.cache, scenes, shop.device))
            logits = answer_logits(shop.family, model, tokens, text, keep)
        shown = None if keep is None else shown_entities(shop.cache, scenes, keep)
        spoken = lm_loss(logits, text, weights, shown)
        seen, numbers = dense(tokens, Truth(shop.cache, scenes, shop.device), 30.0)
        contrastive = contrast(pooled.float(), shop.cache, scenes, rng)
        right = (logits.argmax(-1) == text.labels_A).float().mean()
        numbers |= {"contrast": contrastive.item(), "lm": spoken.item(), "right": right.item()}
        fade = max(0.0, 1 - step / (_FADE * schedule.steps)) if shop.start is None else 0.0
        return fade * seen + 0.2 * contrastive + 4.0 * spoken, numbers

    run_steps(
        "joint",
        parts,
        schedule,
        loss_at,
        joint_checkpoint(shop.folder, shop.start),
        rank=ranks.rank,
        average=ranks.average,
        save_seconds=shop.save_seconds,
    )
