"""Held-out drawn scenes as a dataset: exact answers, and outlines of the objects in question.

Scenes are numbered by seed. The two splits, "tuning" for choosing methods' constants and "report"
for published figures, are disjoint from each other and from the training scenes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Literal, TypeAlias

from PIL import Image

from sppruner.errors import SpecError
from sppruner.evaluation.dataset import Dataset, Item, Outline
from sppruner.evaluation.metrics import ExactMatch
from sppruner.tiny.layout import Scene, Sign, outline
from sppruner.tiny.questions import (
    CAPTION_OBJECTS,
    CAPTION_PROMPT,
    Question,
    caption,
    questions,
)
from sppruner.tiny.scenes import HELD_OUT_SEED, encode_scene, sample_scene

Split: TypeAlias = Literal["report", "tuning"]

CAPTION = "caption"
SPLIT_SCENES = 1_000_000
"""Scenes in each split: "report" starts at HELD_OUT_SEED, "tuning" this many seeds later."""


def drawn_scenes(count: int, *, first_scene: int = 0, split: Split = "report") -> Dataset:
    """At least `count` questions about whole scenes, plus one caption, reported separately, for
    every scene with at most CAPTION_OBJECTS objects: captions of more were not trained.

    first_scene: offset into the split. Raises SpecError at the end of the split.
    """
    total, number = 0, first_scene
    while total < count:
        total += len(questions(sample_scene(_seed(number, split))))
        number += 1
    return scene_questions(range(first_scene, number), split=split)


def scene_questions(scenes: Sequence[int], *, split: Split = "report") -> Dataset:
    """All questions about the scenes of these numbers, and their captions as in `drawn_scenes`.

    Raises SpecError for a number outside the split.
    """
    items: list[Item] = []
    for number in scenes:
        scene = sample_scene(_seed(number, split))
        scene_items = [_item(scene, i, question) for i, question in enumerate(questions(scene))]
        if len(scene.objects) <= CAPTION_OBJECTS:
            captioning = Question(CAPTION, CAPTION_PROMPT, caption(scene))
            scene_items.append(_item(scene, len(scene_items), captioning))
        items += scene_items
    return Dataset(
        name=f"drawn scenes ({split})", items=items, metric=ExactMatch(), max_new_tokens=48
    )


def _seed(number: int, split: Split) -> int:
    if not 0 <= number < SPLIT_SCENES:
        raise SpecError(f"scene {number} is outside the {SPLIT_SCENES:,} of split {split!r}")
    return HELD_OUT_SEED + (SPLIT_SCENES if split == "tuning" else 0) + number


def _item(scene: Scene, index: int, question: Question) -> Item:
    return Item(
        id=f"{scene.seed}-{index}",
        group=str(scene.seed),
        kind=question.kind,
        prompt=question.text,
        answers=(question.answer,),
        image=functools.partial(_decode_scene, scene.seed),
        subjects=subject_outlines(scene, question),
        separate=question.kind == CAPTION,
    )


@functools.lru_cache(maxsize=64)
def _decode_scene(seed: int) -> Image.Image:
    """The scene as a user's JPEG of it decodes."""
    return Image.open(io.BytesIO(encode_scene(sample_scene(seed)))).convert("RGB")


def subject_outlines(scene: Scene, question: Question) -> tuple[Outline, ...]:
    """Outlines of the objects and signs that decide the answer. Empty if the answer depends on the
    ground only, or on something that is not in the scene."""
    outlines = {item.name: tuple(outline(item)) for item in scene.objects}
    outlines |= {f"{sign.color} sign": _sign_outline(sign) for sign in scene.signs}
    return tuple(outlines[name] for name in question.about if name in outlines)


def _sign_outline(sign: Sign) -> Outline:
    left, right = sign.x - sign.side / 2, sign.x + sign.side / 2
    top, bottom = sign.y - sign.side / 2, sign.y + sign.side / 2
    return ((left, top), (right, top), (right, bottom), (left, bottom))
