"""Scores on held-out scenes: exact match per question kind, and how well saliency looks.

`generated` is the claim (JPEG bytes, processor, `generate`); `teacher_forced` is the quick
equivalent that also measures random visual-token subsets at original positions.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sppruner.pruner import Pruner
from sppruner.spec import DENSE, PruneSpec
from sppruner.tiny.questions import CAPTION_OBJECTS, CAPTION_PROMPT, KINDS, caption, questions
from sppruner.tiny.recipe.cache import scene_table
from sppruner.tiny.recipe.families import Family
from sppruner.tiny.recipe.packing import Pack, answer_logits, pack, random_keep
from sppruner.tiny.recipe.space import Truth
from sppruner.tiny.recipe.vision import pixels
from sppruner.tiny.scenes import HELD_OUT_SEED, render, sample_scene

__all__ = [
    "JPEG_QUALITY",
    "KIND_NAMES",
    "Score",
    "generated",
    "graded",
    "saliency_auc",
    "teacher_forced",
]

JPEG_QUALITY: Final = 92
KIND_NAMES: Final = (*KINDS, "caption")
_CPU: Final = torch.device("cpu")


@dataclass(slots=True)
class Score:
    """Right answers among the asked."""

    right: int = 0
    asked: int = 0

    def add(self, right: bool) -> None:
        """Count one answer."""
        self.right += right
        self.asked += 1

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / max(1, self.asked)


def _examples(seeds: Sequence[int]) -> Iterator[tuple[Image.Image, str, str, str]]:
    """Decoded 192 px JPEG, kind, question and answer."""
    for seed in seeds:
        scene = sample_scene(seed)
        buffer = io.BytesIO()
        render(scene).save(buffer, "JPEG", quality=JPEG_QUALITY)
        image = Image.open(buffer)
        for question in questions(scene):
            yield image, question.kind, question.text, question.answer
        if len(scene.objects) <= CAPTION_OBJECTS:
            yield image, "caption", CAPTION_PROMPT, caption(scene)


@torch.inference_mode()
def generated(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: int,
    first: int = HELD_OUT_SEED,
    batch: int = 64,
    spec: PruneSpec = DENSE,
) -> dict[str, Score]:
    """Exact match of greedy `generate` through chat template and processor, per kind.

    With a `spec`, visual tokens are pruned as the library prunes them for its users.
    """
    pruner = Pruner(model, tokenizer=processor.tokenizer)
    scores: dict[str, Score] = defaultdict(Score)
    examples = list(_examples(range(first, first + scenes)))
    examples.sort(key=lambda example: len(example[2]))
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        prompts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": text}],
                    }
                ],
                add_generation_prompt=True,
            )
            for _, _, text, _ in part
        ]
        images = [image for image, *_ in part]
        inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
        inputs = inputs.to(model.device, model.dtype)
        texts = [text for _, _, text, _ in part]
        output = pruner.generate(inputs, spec, texts, max_new_tokens=48)
        said = processor.batch_decode(output.tokens_BT, skip_special_tokens=True)
        for (_, kind, _, answer), text in zip(part, said, strict=True):
            scores[kind].add(text.strip() == answer)
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
