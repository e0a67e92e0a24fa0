"""Exact questions and answers about a scene, and its caption.

Every answer follows from the scene alone, so exact match is a fair score. Ambiguous questions (near
a third of the image, diagonal relations, two neighbours at almost equal distance) are left out. No
question is about a distractor.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sppruner.tiny.layout import COLORS, SHAPES, Scene, SceneObject

__all__ = [
    "CAPTION_OBJECTS",
    "CAPTION_PROMPT",
    "COLUMNS",
    "CONTEXT_KINDS",
    "KINDS",
    "NUMBERS",
    "ROWS",
    "Question",
    "behind_answer",
    "caption",
    "majority_baseline",
    "nearest_answer",
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
    "nearest",
    "behind",
)
CONTEXT_KINDS: Final = ("nearest", "behind")
"""Kinds whose answer is in the surroundings of the named object."""

CAPTION_PROMPT: Final = "describe the image."
CAPTION_OBJECTS: Final = 3
"""Captions are trained and scored on scenes with at most this many objects."""

NUMBERS: Final = ("zero", "one", "two", "three", "four")
ROWS: Final = ("top", "middle", "bottom")
COLUMNS: Final = ("left", "center", "right")
_THIRDS_MARGIN: Final = 0.025
_RELATION_MARGIN: Final = 1.35
_NEAREST_MARGIN: Final = 1.4
_BEHIND_MARGIN: Final = 8 / 96


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its only right answer."""

    kind: str
    """One of `KINDS`, or a caller's own kind."""
    text: str
    """The question, in lower case."""
    answer: str
    """The answer, in lower case."""
    about: tuple[str, ...] = ()
    """Names of the objects that the answer depends on; signs as `red sign`, grounds by name."""


def questions(scene: Scene) -> list[Question]:
    """About twelve questions on the scene, the same for the same seed."""
    rng = random.Random(f"questions:{scene.seed}")
    about_scene = [
        *_size(scene, rng),
        *_existence(scene, rng),
        *_attributes(scene, rng),
        *_counts(scene, rng),
        *_relation(scene, rng),
        *_position(scene, rng),
        *_text(scene, rng),
        *_nearest(scene, rng),
        *_behind(scene, rng),
    ]
    if scene.split is None:
        ground = scene.grounds[0].name
        about_scene.insert(0, Question("background", "what is the background?", ground, (ground,)))
    return about_scene


def caption(scene: Scene) -> str:
    """All objects from left to right, then the background and the signs."""
    ordered = sorted(scene.objects, key=lambda item: item.x)
    listed = ", ".join(f"a {item.size} {item.name}" for item in ordered)
    grounds = " and ".join(ground.name for ground in scene.grounds)
    signs = [f"a sign reading {s.digit}" for s in sorted(scene.signs, key=lambda s: s.x)]
    ending = f" with {' and '.join(signs)}" if signs else ""
    return f"{listed} on a {grounds} background{ending}"


def majority_baseline(scene_questions: Iterable[Question]) -> dict[str, float]:
    """Per kind, the accuracy of always giving that kind's most frequent answer."""
    answers: dict[str, Counter[str]] = {}
    for question in scene_questions:
        answers.setdefault(question.kind, Counter())[question.answer] += 1
    return {
        kind: max(counter.values()) / sum(counter.values()) for kind, counter in answers.items()
    }


def position_answer(x: float, y: float) -> str | None:
    """The cell of a 3 x 3 grid as `row column`; None within 2.5 % of a border between cells."""
    if any(abs(v - border) < _THIRDS_MARGIN for v in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    return f"{ROWS[int(y * 3)]} {COLUMNS[int(x * 3)]}"


def relation_answer(item: SceneObject, other: SceneObject) -> str | None:
    """The direction from `other` to `item`; None unless one axis clearly dominates."""
    dx, dy = item.x - other.x, item.y - other.y
    if abs(dx) > _RELATION_MARGIN * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > _RELATION_MARGIN * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def nearest_answer(scene: Scene, item: SceneObject) -> SceneObject | None:
    """The object with the nearest centre; None unless every other is at least 1.4 times as far."""
    others = [other for other in scene.objects if other is not item]
    others.sort(key=lambda other: math.hypot(other.x - item.x, other.y - item.y))
    first, second = (math.hypot(o.x - item.x, o.y - item.y) for o in others[:2])
    return others[0] if second > _NEAREST_MARGIN * first else None


def behind_answer(scene: Scene, item: SceneObject) -> str | None:
    """The ground behind an object of a two-ground scene; None near the line between the grounds."""
    if scene.split is None:
        return None
    if abs(scene.split.distance(item.x, item.y)) < item.radius + _BEHIND_MARGIN:
        return None
    return scene.grounds[scene.ground_at(item.x, item.y)].name


def _shuffled(scene: Scene, rng: random.Random) -> list[SceneObject]:
    return rng.sample(scene.objects, len(scene.objects))


def _size(scene: Scene, rng: random.Random) -> list[Question]:
    item = rng.choice(scene.objects)
    return [Question("size", f"what size is the {item.name}?", item.size, (item.name,))]


def _existence(scene: Scene, rng: random.Random) -> list[Question]:
    present = {(item.color, item.shape) for item in scene.objects}
    absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    # Hard negatives share the colour or the shape with an object of the scene.
    colors, shapes = {c for c, _ in present}, {s for _, s in present}
    near = [(c, s) for c, s in absent if c in colors or s in shapes]
    item = rng.choice(scene.objects)
    color, shape = rng.choice(near if rng.random() < 0.75 else absent)
    alike = tuple(o.name for o in scene.objects if o.color == color or o.shape == shape)
    return [
        Question("existence", f"is there a {item.name}?", "yes", (item.name,)),
        Question("existence", f"is there a {color} {shape}?", "no", alike),
    ]


def _attributes(scene: Scene, rng: random.Random) -> list[Question]:
    """Shape by colour and colour by shape, only if the name is unique."""
    colors = Counter(item.color for item in scene.objects)
    shapes = Counter(item.shape for item in scene.objects)
    by_color = [item for item in scene.objects if colors[item.color] == 1]
    by_shape = [item for item in scene.objects if shapes[item.shape] == 1]
    found = []
    for item in rng.sample(by_color, min(1, len(by_color))):
        text = f"what shape is the {item.color} object?"
        found.append(Question("shape", text, item.shape, (item.name,)))
    for item in rng.sample(by_shape, min(1, len(by_shape))):
        word = "colour" if rng.random() < 0.25 else "color"
        text = f"what {word} is the {item.shape}?"
        found.append(Question("colour", text, item.color, (item.name,)))
    return found


def _counts(scene: Scene, rng: random.Random) -> list[Question]:
    """One by shape and one by colour; counts up to four, rarely zero."""
    found = []
    for words, attribute in ((SHAPES, "shape"), (COLORS, "color")):
        named: dict[str, list[SceneObject]] = {word: [] for word in words}
        for item in scene.objects:
            named[getattr(item, attribute)].append(item)
        some = [word for word, items in named.items() if 0 < len(items) < len(NUMBERS)]
        none = [word for word, items in named.items() if not items]
        several = [word for word in some if len(named[word]) > 1]
        pool = none if none and rng.random() < 0.12 else some
        if several and rng.random() < 0.6:
            pool = several
        word = rng.choice(pool or none or [words[0]])
        if len(named[word]) >= len(NUMBERS):
            continue
        noun = f"{word} objects" if attribute == "color" else plural(word)
        about = tuple(item.name for item in named[word])
        number = NUMBERS[len(about)]
        found.append(Question("count", f"how many {noun} are there?", number, about))
    return found


def plural(shape: str) -> str:
    """The plural of a shape, such as `crosses`."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _relation(scene: Scene, rng: random.Random) -> list[Question]:
    pairs = [(a, b) for a in scene.objects for b in scene.objects if a is not b]
    rng.shuffle(pairs)
    for item, other in pairs:
        answer = relation_answer(item, other)
        if answer is not None:
            text = f"where is the {item.name} relative to the {other.name}?"
            return [Question("relation", text, answer, (item.name, other.name))]
    return []


def _position(scene: Scene, rng: random.Random) -> list[Question]:
    for item in _shuffled(scene, rng):
        answer = position_answer(item.x, item.y)
        if answer is not None:
            return [Question("position", f"where is the {item.name}?", answer, (item.name,))]
    return []


def _text(scene: Scene, rng: random.Random) -> list[Question]:
    if not scene.signs:
        return []
    sign = rng.choice(scene.signs)
    noun = "sign" if len(scene.signs) == 1 else f"{sign.color} sign"
    about = (f"{sign.color} sign",)
    return [Question("text", f"what number is on the {noun}?", sign.digit, about)]


def _nearest(scene: Scene, rng: random.Random) -> list[Question]:
    found = []
    for item in _shuffled(scene, rng):
        near = nearest_answer(scene, item)
        if near is not None:
            text = f"what is nearest to the {item.name}?"
            found.append(Question("nearest", text, near.name, (item.name, near.name)))
    return found[:2]


def _behind(scene: Scene, rng: random.Random) -> list[Question]:
    for item in _shuffled(scene, rng):
        ground = behind_answer(scene, item)
        if ground is not None:
            text = f"what is behind the {item.name}?"
            return [Question("behind", text, ground, (item.name, ground))]
    return []
