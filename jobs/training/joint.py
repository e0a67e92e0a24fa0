"""Stage J: vision and language are trained together on pixels.

Visual tokens are dropped uniformly at random in half of the steps, which favours no pruning method;
questions about entities that no kept token shows are not trained on. Embeddings stay frozen. The
dense losses fade out over the first two thirds: in the end the visual tokens carry what answering
needs, not what `space` prescribes.
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
from jobs.training.language import build_kind_weights, sample_keep
from jobs.training.loop import Draws, LearningRateSchedule, load_checkpoint, run_steps
from jobs.training.packing import (
    compute_answer_logits,
    compute_lm_loss,
    find_shown_entities,
    pack_scenes,
)
from jobs.training.ranks import Ranks
from jobs.training.space import PatchTruth
from jobs.training.stages import ENCODER_KEY, TrainingContext
from jobs.training.vision import DenseLoss, normalise_images

__all__ = ["load_joint_model", "locate_joint_checkpoint", "train_joint"]

_JOINT: Final = 3
_BATCH: Final = 24  # over all ranks
_FADE: Final = 2 / 3  # share of the steps over which the dense losses fade to zero


def _collect_parts(family: Family, model: Any, contrast: CaptionContrast) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            ENCODER_KEY: family.build_vision_encoder(model),
            "contrast": contrast,
            "language": model.model.language_model,
        }
    )


def locate_joint_checkpoint(work: Path, start: Path | None) -> Path:
    """The stage's checkpoint: one file per model folder that it continues from.

    The name contains a hash of the weights, so that no other run's checkpoint is used.
    """
    if start is None:
        return work / "joint.pt"
    weights = hashlib.sha256((start / "model.safetensors").read_bytes())
    return work / f"joint-from-{weights.hexdigest()[:16]}.pt"


def load_joint_model(family: Family, checkpoint: Path) -> Any:
    """The model at a checkpoint of this stage, float32 on the CPU."""
    model = family.build(family.tokenizer())
    parts = _collect_parts(family, model, CaptionContrast())
    state = load_checkpoint(checkpoint, torch.device("cpu"))
    parts.load_state_dict(state["model"])
    return model.eval()


def train_joint(context: TrainingContext, ranks: Ranks) -> None:
    """Trains stage J from the checkpoints of the stages before it.

    With a finished model (`context.start`) the stage continues as it ended: without dense losses,
    and with a new caption tower, which a model folder does not contain. Its batches continue after
    those of the joint training before it, which would otherwise be trained on again.
    """
    model, space = context.build()
    contrast = CaptionContrast().to(context.device)
    parts = _collect_parts(context.family, model, contrast)
    if context.start is None:
        language_state = load_checkpoint(context.folder / "language.pt", context.device)
        vision_state = load_checkpoint(context.folder / "sharpen.pt", context.device)
        vision_parts = nn.ModuleDict({ENCODER_KEY: parts[ENCODER_KEY], "contrast": contrast})
        parts["language"].load_state_dict(language_state["model"])
        vision_parts.load_state_dict(vision_state["model"])
        done = 0
    else:
        finished = AutoModelForImageTextToText.from_pretrained(context.start, dtype=torch.float32)
        model.load_state_dict(finished.state_dict())
        done = History.read(context.start).joint_steps

    encode = context.compile(parts[ENCODER_KEY])
    dense = DenseLoss(space, sharp=True)
    weights = build_kind_weights(context.device, background=0.5, behind=2.0, count=3.0, nearest=4.0)
    batch = _BATCH // ranks.world
    schedule = LearningRateSchedule(
        steps=context.steps(2000), peak=1e-3, warmup=40, hold=0.35, floor=0.03
    )

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        draws = Draws(stage=_JOINT, step=done + step, rank=ranks.rank)
        rng = draws.numpy()
        scenes = draws.scenes(len(context.cache), batch, ranks.world)
        text = pack_scenes(context.cache, scenes, rng, 0.75, context.device)
        # All ranks keep the same number of tokens, so that no rank waits for another.
        keep = sample_keep(batch, Draws(stage=_JOINT, step=done + step).torch())
        with torch.autocast(context.device.type, torch.bfloat16):
            tokens, pooled = encode(normalise_images(context.cache, scenes, context.device))
            logits = compute_answer_logits(context.family, model, tokens, text, keep)
        shown = None if keep is None else find_shown_entities(context.cache, scenes, keep)
        language_loss = compute_lm_loss(logits, text, weights, shown)
        vision_loss, numbers = dense(
            tokens, PatchTruth(context.cache, scenes, context.device), 30.0
        )
        contrastive = contrast(pooled.float(), context.cache, scenes, rng)
        right = (logits.argmax(-1) == text.labels_A).float().mean()
        numbers |= {
            "contrast": contrastive.item(),
            "lm": language_loss.item(),
            "right": right.item(),
        }
        fade = max(0.0, 1 - step / (_FADE * schedule.steps)) if context.start is None else 0.0
        return fade * vision_loss + 0.2 * contrastive + 4.0 * language_loss, numbers

    run_steps(
        "joint",
        parts,
        schedule,
        loss_at,
        locate_joint_checkpoint(context.folder, context.start),
        rank=ranks.rank,
        average=ranks.average,
        save_seconds=context.save_seconds,
    )
