"""Scores on held-out scenes: exact match per question kind, and how well saliency looks.

`generated` is the claim (JPEG bytes, processor, `generate`), asked as the library's evaluation
asks any model; `teacher_forced` is the quick equivalent on visual-token subsets of our choosing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from jobs.training.families import Family
from jobs.training.packing import Pack, answer_logits, pack, random_keep
from jobs.training.scene_cache import scene_table
from jobs.training.space import Truth
from jobs.training.vision import pixels
from sppruner.errors import EvaluationError
from sppruner.evaluation import compare, label
from sppruner.evaluation import score as evaluation
from sppruner.evaluation.dataset import Dataset
from sppruner.models.loading import LoadedModel
from sppruner.spec import PruneSpec
from sppruner.tiny.questions import KINDS
from sppruner.tiny.scenes import HELD_OUT_SEED, JPEG_QUALITY

__all__ = ["KIND_NAMES", "Score", "generated", "graded", "saliency_auc", "teacher_forced"]

KIND_NAMES: Final = (*KINDS, "caption")
_CPU: Final = torch.device("cpu")


@dataclass(slots=True)
class Score:
    """Right answers among the asked."""

    right: float = 0
    asked: int = 0

    def add(self, right: float) -> None:
        """Count one answer; a share of it where it was asked several times."""
        self.right += right
        self.asked += 1

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / max(1, self.asked)


def generated(
    loaded: LoadedModel, dataset: Dataset, specs: Sequence[PruneSpec] = ()
) -> list[dict[str, Score]]:
    """Exact match of greedy `generate` per kind: of all tokens first, then under each spec.

    Raises EvaluationError for specs that the model cannot run.
    """
    comparison = compare(loaded, dataset, specs)
    if comparison.cannot:
        reasons = [
            f"{label(failed.spec.method, failed.spec.options)} with {failed.spec.budget}: "
            f"{failed.reason}"
            for failed in comparison.cannot
        ]
        raise EvaluationError(
            f"{loaded.identity.name} cannot run these specs, leave them out: {'; '.join(reasons)}"
        )
    return [_per_kind(score) for score in (comparison.dense, *comparison.scores)]


def _per_kind(answered: evaluation.Score) -> dict[str, Score]:
    scores: dict[str, Score] = defaultdict(Score)
    for item, right in zip(answered.dataset.items, answered.per_item, strict=True):
        scores[item.kind].add(right)
    return {kind: scores[kind] for kind in KIND_NAMES if kind in scores}


@torch.inference_mode()
def teacher_forced(
    family: Family,
    model: Any,
    scenes: int,
    first: int = HELD_OUT_SEED,
    kept: int | None = None,
    draw: int = 0,
    batch: int = 20,
) -> dict[str, Score]:
    """Exact match when every answer token is predicted from the true ones before it.

    Equal to greedy decoding; with `kept`, each image keeps that many random visual tokens.
    """
    cache = scene_table(first, scenes, JPEG_QUALITY)
    look = family.eyes(model)
    generator = torch.Generator().manual_seed(draw)
    rng = np.random.default_rng(0)
    scores: dict[str, Score] = defaultdict(Score)
    for start in range(0, scenes, batch):
        rows = np.arange(start, min(start + batch, scenes))
        text = pack(cache, rows, rng, 1.0, _CPU)
        seen, _ = look(pixels(cache, rows, _CPU).to(model.dtype))
        keep = None if kept is None else random_keep(len(rows), kept, generator)
        logits = answer_logits(family, model, seen, text, keep)
        for kind, right in graded(logits, text):
            scores[kind].add(right)
    return {kind: scores[kind] for kind in KIND_NAMES if kind in scores}


def graded(logits_AV: Tensor, text: Pack) -> list[tuple[str, bool]]:
    """Kind of every question, in order, and whether all tokens of its answer are right."""
    wrong = logits_AV.argmax(-1) != text.labels_A
    count = int(text.questions_A.max()) + 1
    missed = torch.zeros(count).index_add(0, text.questions_A, wrong.float()) > 0
    kinds = torch.zeros(count, dtype=torch.long).scatter(0, text.questions_A, text.kinds_A)
    return [
        (KIND_NAMES[kind], not miss)
        for kind, miss in zip(kinds.tolist(), missed.tolist(), strict=True)
    ]


@torch.inference_mode()
def saliency_auc(
    family: Family, model: Any, scenes: int, first: int = HELD_OUT_SEED
) -> list[float]:
    """Per vision layer with one: how well attention saliency ranks things above background.

    Mean over scenes of the area under the ROC curve, 0.5 for attention that does not care. Things
    are objects and signs; distractors count as background.
    """
    cache = scene_table(first, scenes, JPEG_QUALITY)
    rows = np.arange(scenes)
    things = Truth(cache, rows, _CPU).things_BN
    areas = []
    for saliency in family.saliency(model, pixels(cache, rows, _CPU)):
        per_scene = []
        for score, mask in zip(saliency, things, strict=True):
            inside, outside = score[mask], score[~mask]
            higher = (inside[:, None] > outside).float() + 0.5 * (inside[:, None] == outside)
            per_scene.append(higher.mean())
        areas.append(float(torch.stack(per_scene).mean()))
    return areas
