"""Exact questions and answers about a scene, and its caption.

Every answer follows from the scene alone, so exact match is a fair score. Questions whose answer
would be a close call (near a third of the image, diagonal relations) are not asked.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sppruner.tiny.scenes import COLORS, SHAPES, Scene, SceneObject

__all__ = [
    "CAPTION_OBJECTS",
    "CAPTION_PROMPT",
    "KINDS",
    "Question",
    "background_answer",
    "caption",
    "majority_baseline",
    "position_answer",
    "questions",
    "relation_answer",
]

KINDS: Final = (
    "background",
    "size",
    "existence",
    "shape",
    "count",
    "colour",
    "relation",
    "position",
    "text",
)
CAPTION_PROMPT: Final = "describe the image."
CAPTION_OBJECTS: Final = 3
"""Captions are trained and scored on scenes with at most this many objects."""

NUMBERS: Final = ("zero", "one", "two", "three", "four")
ROWS: Final = ("top", "middle", "bottom")
COLUMNS: Final = ("left", "center", "right")
_THIRDS_MARGIN: Final = 0.025
_RELATION_MARGIN: Final = 1.35


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a `kind` in `KINDS` with its only right answer, both lower case."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene) -> list[Question]:
    """Around eleven questions about the scene, the same ones for the same seed."""
    rng = random.Random(f"questions:{scene.seed}")
    asked = [
        Question("background", "what is the background?", background_answer(scene)),
        *_sizes(scene, rng),
        *_existence(scene, rng),
        *_attributes(scene, rng),
        *_counts(scene, rng),
        *_relations(scene, rng),
        *_positions(scene, rng),
    ]
    if scene.sign is not None:
        asked.append(Question("text", "what number is on the sign?", scene.sign.digit))
    return asked


def caption(scene: Scene) -> str:
    """All objects from left to right, then the background and the sign."""
    ordered = sorted(scene.objects, key=lambda item: item.x)
    listed = ", ".join(f"a {item.size} {item.name}" for item in ordered)
    sign = f" with a sign reading {scene.sign.digit}" if scene.sign is not None else ""
    return f"{listed} on a {background_answer(scene)} background{sign}"


def majority_baseline(asked: Iterable[Question]) -> dict[str, float]:
    """Per kind, the accuracy of always giving that kind's most frequent answer."""
    answers: dict[str, Counter[str]] = {}
    for question in asked:
        answers.setdefault(question.kind, Counter())[question.answer] += 1
    return {
        kind: max(counter.values()) / sum(counter.values()) for kind, counter in answers.items()
    }


def background_answer(scene: Scene) -> str:
    """Texture, then colour: `striped tan`."""
    return f"{scene.texture} {scene.background}"


def position_answer(x: float, y: float) -> str | None:
    """The cell of a 3 x 3 grid as `row column`; None within 2.5 % of a border between cells."""
    if any(abs(v - border) < _THIRDS_MARGIN for v in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    return f"{ROWS[int(y * 3)]} {COLUMNS[int(x * 3)]}"


def relation_answer(item: SceneObject, other: SceneObject) -> str | None:
    """Where `item` lies as seen from `other`; None unless one axis dominates clearly."""
    dx, dy = item.x - other.x, item.y - other.y
    if abs(dx) > _RELATION_MARGIN * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > _RELATION_MARGIN * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _sizes(scene: Scene, rng: random.Random) -> list[Question]:
    picked = rng.sample(scene.objects, min(2, len(scene.objects)))
    return [Question("size", f"what size is the {item.name}?", item.size) for item in picked]


def _existence(scene: Scene, rng: random.Random) -> list[Question]:
    present = {(item.color, item.shape) for item in scene.objects}
    absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    # Hard negatives share the colour or the shape with something in the scene.
    colors, shapes = {c for c, _ in present}, {s for _, s in present}
    near = [(c, s) for c, s in absent if c in colors or s in shapes]
    item = rng.choice(scene.objects)
    color, shape = rng.choice(near if rng.random() < 0.75 else absent)
    return [
        Question("existence", f"is there a {item.name}?", "yes"),
        Question("existence", f"is there a {color} {shape}?", "no"),
    ]


def _attributes(scene: Scene, rng: random.Random) -> list[Question]:
    """Shape by colour and colour by shape, only where that names one object."""
    colors = Counter(item.color for item in scene.objects)
    shapes = Counter(item.shape for item in scene.objects)
    by_color = [item for item in scene.objects if colors[item.color] == 1]
    by_shape = [item for item in scene.objects if shapes[item.shape] == 1]
    asked = [
        Question("shape", f"what shape is the {item.color} object?", item.shape)
        for item in rng.sample(by_color, min(2, len(by_color)))
    ]
    for item in rng.sample(by_shape, min(2, len(by_shape))):
        word = "colour" if rng.random() < 0.25 else "color"
        asked.append(Question("colour", f"what {word} is the {item.shape}?", item.color))
    return asked


def _counts(scene: Scene, rng: random.Random) -> list[Question]:
    def count(noun: str, number: int) -> Question:
        return Question("count", f"how many {noun} are there?", NUMBERS[number])

    shape = rng.choice(scene.objects).shape if rng.random() < 0.8 else rng.choice(SHAPES)
    color = rng.choice(scene.objects).color if rng.random() < 0.7 else rng.choice(COLORS)
    by_shape = count(
        "crosses" if shape == "cross" else f"{shape}s",
        sum(item.shape == shape for item in scene.objects),
    )
    if rng.random() < 0.5:
        return [by_shape, count("objects", len(scene.objects))]
    by_color = count(f"{color} objects", sum(item.color == color for item in scene.objects))
    return [by_shape, by_color]


def _relations(scene: Scene, rng: random.Random) -> list[Question]:
    pairs = [(a, b) for a in scene.objects for b in scene.objects if a is not b]
    rng.shuffle(pairs)
    asked = []
    for item, other in pairs:
        answer = relation_answer(item, other)
        if answer is not None:
            text = f"where is the {item.name} relative to the {other.name}?"
            asked.append(Question("relation", text, answer))
    return asked[:2]


def _positions(scene: Scene, rng: random.Random) -> list[Question]:
    asked = []
    for item in rng.sample(scene.objects, len(scene.objects)):
        answer = position_answer(item.x, item.y)
        if answer is not None:
            asked.append(Question("position", f"where is the {item.name}?", answer))
    return asked[:2]
