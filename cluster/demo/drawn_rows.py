"""Rows of a corpus, drawn without end from seeds that no model was trained on."""

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
# Corpora of different seeds share no scene up to this many scenes.
_SCENES_PER_SEED = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row with its reference answer. `caption` is set for captions, the rest for VQA."""

    key: str
    image: bytes | None
    caption: str | None = None
    question: str | None = None
    answer: str | None = None
    question_type: str | None = None


def draw_rows(kind: Kind, seed: int) -> Iterator[Row]:
    """One row per scene for captions, up to four questions on each scene for VQA.

    Captions are asked only of scenes with few enough objects for the embedded model to have been
    taught to list them.
    """
    for number in count(HELD_OUT_SEED + seed * _SCENES_PER_SEED):
        scene = sample_scene(number)
        key = f"scene-{number}"
        if kind == "caption":
            if len(scene.objects) <= CAPTION_OBJECTS:
                yield Row(key=key, image=encode_scene(scene, IMAGE_PIXELS), caption=caption(scene))
            continue
        image = encode_scene(scene, IMAGE_PIXELS)
        asked = questions(scene)
        picked = random.Random(number).sample(asked, min(QUESTIONS_PER_SCENE, len(asked)))
        for index, question in enumerate(picked):
            yield Row(
                key=f"{key}-{index}",
                image=image,
                question=question.text,
                answer=question.answer,
                question_type=question.kind,
            )
