"""An endless stream of corpus rows, drawn from seeds that no model was trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from cluster.config import Kind
from sppruner.tiny.questions import CAPTION_OBJECTS, caption, questions
from sppruner.tiny.scenes import HELD_OUT_SEED, encode_scene, sample_scene

IMAGE_PIXELS = 192
QUESTIONS_PER_SCENE = 4
# Corpora of different seeds share no scene as long as each has at most this many.
SCENES_PER_SEED = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRow:
    """One row with its reference answer."""

    key: str
    """Unique in a corpus without faults."""
    image: bytes | None
    """JPEG bytes; None for a planted fault."""
    caption: str | None = None
    """Reference caption; None for VQA."""
    question: str | None = None
    """VQA only."""
    answer: str | None = None
    """Reference answer; VQA only."""
    question_type: str | None = None
    """Kind of question; VQA only."""


def draw_rows(kind: Kind, seed: int) -> Iterator[DrawnRow]:
    """One row per scene for captions, up to four questions per scene for VQA.

    Caption rows use only scenes with at most CAPTION_OBJECTS objects: the embedded model was not
    trained to list more.
    """
    for number in count(HELD_OUT_SEED + seed * SCENES_PER_SEED):
        scene = sample_scene(number)
        key = f"scene-{number}"
        if kind == "caption":
            if len(scene.objects) <= CAPTION_OBJECTS:
                yield DrawnRow(
                    key=key, image=encode_scene(scene, IMAGE_PIXELS), caption=caption(scene)
                )
            continue
        image = encode_scene(scene, IMAGE_PIXELS)
        available = questions(scene)
        number_picked = min(QUESTIONS_PER_SCENE, len(available))
        picked = random.Random(number).sample(available, number_picked)
        for index, question in enumerate(picked):
            yield DrawnRow(
                key=f"{key}-{index}",
                image=image,
                question=question.text,
                answer=question.answer,
                question_type=question.kind,
            )
