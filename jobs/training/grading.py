"""Scores on held-out scenes: exact match per question kind, and the AUC of attention saliency.

`score_generated` is the published figure: JPEG bytes, processor and `generate`, with the library's
evaluation. `score_teacher_forced` is a fast equivalent on given subsets of visual tokens.
Shapes: A answer tokens, V vocabulary, B scenes, N = 144 visual tokens.
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
from jobs.training.packing import (
    PackedQuestions,
    compute_answer_logits,
    pack_scenes,
    sample_random_keep,
)
from jobs.training.scene_cache import build_scene_table
from jobs.training.space import PatchTruth
from jobs.training.vision import normalise_images
from sppruner.errors import EvaluationError
from sppruner.evaluation import compare, method_label
from sppruner.evaluation import score as evaluation
from sppruner.evaluation.dataset import Dataset
from sppruner.models.loading import LoadedModel
from sppruner.spec import PruneSpec
from sppruner.tiny.questions import KINDS
from sppruner.tiny.scenes import HELD_OUT_SEED, JPEG_QUALITY

__all__ = [
    "KIND_NAMES",
    "KindScore",
    "grade_answers",
    "measure_saliency_auc",
    "score_generated",
    "score_teacher_forced",
]

KIND_NAMES: Final = (*KINDS, "caption")
_CPU: Final = torch.device("cpu")


@dataclass(slots=True)
class KindScore:
    """Correct answers to the questions of one kind."""

    correct: float = 0
    """Sum of correct answers; fractional if a question was answered several times."""
    total: int = 0
    """Questions."""

    def add(self, correct: float) -> None:
        """Adds one question; `correct` is a share if it was answered several times."""
        self.correct += correct
        self.total += 1

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.correct / max(1, self.total)


def score_generated(
    loaded: LoadedModel, dataset: Dataset, specs: Sequence[PruneSpec] = ()
) -> list[dict[str, KindScore]]:
    """Exact match of greedy `generate` per kind: dense first, then with each spec.

    Raises EvaluationError for specs that the model cannot run.
    """
    comparison = compare(loaded, dataset, specs)
    if comparison.unsupported:
        reasons = [
            f"{method_label(failed.spec.method, failed.spec.options)} with {failed.spec.budget}: "
            f"{failed.reason}"
            for failed in comparison.unsupported
        ]
        raise EvaluationError(
            f"{loaded.identity.name} cannot run these specs, leave them out: {'; '.join(reasons)}"
        )
    return [_group_by_kind(score) for score in (comparison.dense, *comparison.scores)]


def _group_by_kind(scored: evaluation.SpecScore) -> dict[str, KindScore]:
    scores: dict[str, KindScore] = defaultdict(KindScore)
    for item, correct in zip(scored.dataset.items, scored.per_item, strict=True):
        scores[item.kind].add(correct)
    return {kind: scores[kind] for kind in KIND_NAMES if kind in scores}


@torch.inference_mode()
def score_teacher_forced(
    family: Family,
    model: Any,
    scenes: int,
    first: int = HELD_OUT_SEED,
    kept: int | None = None,
    draw: int = 0,
    batch: int = 20,
) -> dict[str, KindScore]:
    """Exact match with teacher forcing: answer tokens are predicted from the true ones before them.

    Equals greedy decoding; with `kept`, each image keeps that many random visual tokens.
    """
    cache = build_scene_table(first, scenes, JPEG_QUALITY)
    encode = family.build_vision_encoder(model)
    generator = torch.Generator().manual_seed(draw)
    rng = np.random.default_rng(0)
    scores: dict[str, KindScore] = defaultdict(KindScore)
    for start in range(0, scenes, batch):
        rows = np.arange(start, min(start + batch, scenes))
        text = pack_scenes(cache, rows, rng, 1.0, _CPU)
        tokens, _ = encode(normalise_images(cache, rows, _CPU).to(model.dtype))
        keep = None if kept is None else sample_random_keep(len(rows), kept, generator)
        logits = compute_answer_logits(family, model, tokens, text, keep)
        for kind, correct in grade_answers(logits, text):
            scores[kind].add(correct)
    return {kind: scores[kind] for kind in KIND_NAMES if kind in scores}


def grade_answers(logits_AV: Tensor, text: PackedQuestions) -> list[tuple[str, bool]]:
    """Kind of every question, in order, and whether all tokens of its answer are correct."""
    wrong = logits_AV.argmax(-1) != text.labels_A
    count = int(text.questions_A.max()) + 1
    wrong_answers = torch.zeros(count).index_add(0, text.questions_A, wrong.float()) > 0
    kinds = torch.zeros(count, dtype=torch.long).scatter(0, text.questions_A, text.kinds_A)
    return [
        (KIND_NAMES[kind], not wrong_answer)
        for kind, wrong_answer in zip(kinds.tolist(), wrong_answers.tolist(), strict=True)
    ]


@torch.inference_mode()
def measure_saliency_auc(
    family: Family, model: Any, scenes: int, first: int = HELD_OUT_SEED
) -> list[float]:
    """How well attention saliency ranks objects and signs above background, per vision layer that
    has saliency: area under the ROC curve, mean over scenes; 0.5 is chance. Distractors count as
    background.
    """
    cache = build_scene_table(first, scenes, JPEG_QUALITY)
    rows = np.arange(scenes)
    things = PatchTruth(cache, rows, _CPU).things_BN
    areas = []
    for saliency in family.saliency(model, normalise_images(cache, rows, _CPU)):
        per_scene = []
        for score, mask in zip(saliency, things, strict=True):
            inside, outside = score[mask], score[~mask]
            higher = (inside[:, None] > outside).float() + 0.5 * (inside[:, None] == outside)
            per_scene.append(higher.mean())
        areas.append(float(torch.stack(per_scene).mean()))
    return areas
