"""Held-out drawn scenes as a dataset: exact answers, and outlines of what is asked about.

Scenes are numbered by seed. Those that methods' constants are chosen on and those that are
reported are disjoint, and neither was trained on.
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
"""Scenes in each split: reporting from HELD_OUT_SEED on, tuning so many further on."""


def drawn_scenes(count: int, *, first_scene: int = 0, split: Split = "report") -> Dataset:
    """At least `count` questions, whole scenes only, plus a caption, reported apart, for every
    scene with few enough objects to have been taught one.

    first_scene: offset into the split. Raises SpecError where the split ends.
    """
    asked, number = 0, first_scene
    while asked < count:
        asked += len(questions(sample_scene(_seed(number, split))))
        number += 1
    return scene_questions(range(first_scene, number), split=split)


def scene_questions(scenes: Sequence[int], *, split: Split = "report") -> Dataset:
    """All questions about the scenes of these numbers, and their captions as `drawn_scenes` says.

    Raises SpecError for a number outside the split.
    """
    items: list[Item] = []
    for number in scenes:
        scene = sample_scene(_seed(number, split))
        about = questions(scene)
        items += [_item(scene, i, question) for i, question in enumerate(about)]
        if len(scene.objects) <= CAPTION_OBJECTS:
            told = Question(CAPTION, CAPTION_PROMPT, caption(scene))
            items.append(_item(scene, len(about), told))
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
        image=functools.partial(_decoded, scene.seed),
        subjects=subjects(scene, question),
        apart=question.kind == CAPTION,
    )


@functools.lru_cache(maxsize=64)
def _decoded(seed: int) -> Image.Image:
    """What a user's JPEG of the scene would decode to."""
    return Image.open(io.BytesIO(encode_scene(sample_scene(seed)))).convert("RGB")


def subjects(scene: Scene, question: Question) -> tuple[Outline, ...]:
    """Outlines of the objects and signs that decide the answer. Empty where it is the ground that
    does, or something that is not there."""
    things = {item.name: tuple(outline(item)) for item in scene.objects}
    things |= {f"{sign.color} sign": _card(sign) for sign in scene.signs}
    return tuple(things[name] for name in question.about if name in things)


def _card(sign: Sign) -> Outline:
    left, right = sign.x - sign.side / 2, sign.x + sign.side / 2
    top, bottom = sign.y - sign.side / 2, sign.y + sign.side / 2
    return ((left, top), (right, top), (right, bottom), (left, bottom))
