"""Answers equal those that independent code derives from the question's text and the scene."""

from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from sppruner.tiny.questions import (
    KINDS,
    NUMBERS,
    Question,
    caption,
    majority_baseline,
    position_answer,
    questions,
)
from sppruner.tiny.scenes import COLORS, SHAPES, Scene, SceneObject, sample_scene

SEEDS = st.integers(0, 50_000_000)


def _named(scene: Scene, phrase: str) -> list[SceneObject]:
    """Objects that match every colour and shape word of a phrase, plural or not."""
    words = [re.sub(r"(?<=cross)es$|(?<!s)s$", "", word) for word in phrase.split()]
    return [
        item
        for item in scene.objects
        if all(word not in COLORS or word == item.color for word in words)
        and all(word not in SHAPES or word == item.shape for word in words)
    ]


def _expected(scene: Scene, question: Question) -> str:
    text = question.text
    if question.kind == "background":
        (ground,) = scene.grounds
        return f"{ground.texture} {ground.color}"
    if question.kind == "existence":
        return "yes" if _named(scene, text.rstrip("?")) else "no"
    if question.kind == "count":
        return NUMBERS[len(_named(scene, text))]
    if question.kind == "text":
        named = [sign for sign in scene.signs if f" {sign.color} sign" in text] or scene.signs
        (sign,) = named
        return sign.digit
    if question.kind == "relation":
        first, second = text.removeprefix("where is the ").rstrip("?").split(" relative to the ")
        (item,), (other,) = _named(scene, first), _named(scene, second)
        dx, dy = item.x - other.x, item.y - other.y
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "below" if dy > 0 else "above"
    (item,) = _named(scene, text.rstrip("?"))
    if question.kind == "nearest":
        _, *gaps = sorted((math.hypot(o.x - item.x, o.y - item.y), o.name) for o in scene.objects)
        assert gaps[1][0] > 1.4 * gaps[0][0]
        return gaps[0][1]
    if question.kind == "behind":
        assert scene.split is not None
        line = scene.split
        before = (item.x if line.upright else item.y) < line.at
        ground = scene.grounds[0 if before else 1]
        return f"{ground.texture} {ground.color}"
    if question.kind == "position":
        row = "top" if item.y < 1 / 3 else "middle" if item.y < 2 / 3 else "bottom"
        column = "left" if item.x < 1 / 3 else "center" if item.x < 2 / 3 else "right"
        return f"{row} {column}"
    return {"size": item.size, "shape": item.shape, "colour": item.color}[question.kind]


@given(SEEDS)
def test_answers_follow_from_the_scene(seed: int) -> None:
    scene = sample_scene(seed)
    generated = questions(scene)
    assert generated == questions(scene)
    for question in generated:
        assert question.answer == _expected(scene, question), question


@given(SEEDS)
def test_a_question_names_what_its_answer_depends_on(seed: int) -> None:
    scene = sample_scene(seed)
    names = {item.name for item in scene.objects} | {f"{s.color} sign" for s in scene.signs}
    names |= {ground.name for ground in scene.grounds}
    for question in questions(scene):
        assert set(question.about) <= names
        if question.kind not in ("existence", "count"):
            assert question.about
        if question.kind == "count":
            assert NUMBERS[len(question.about)] == question.answer
        if question.kind in ("nearest", "behind"):
            assert question.answer in question.about


def test_every_kind_occurs() -> None:
    assert {q.kind for seed in range(50) for q in questions(sample_scene(seed))} == set(KINDS)


@given(SEEDS)
def test_caption_lists_objects_left_to_right(seed: int) -> None:
    scene = sample_scene(seed)
    text = caption(scene)
    places = [text.index(f"a {item.size} {item.name}") for item in scene.objects]
    by_column = [p for _, p in sorted(zip([i.x for i in scene.objects], places, strict=True))]
    assert by_column == sorted(by_column)
    for ground in scene.grounds:
        assert ground.name in text
    assert text.count("a sign reading") == len(scene.signs)


def test_a_position_near_a_border_has_no_answer() -> None:
    assert position_answer(1 / 3 + 0.02, 0.5) is None
    assert position_answer(0.5, 2 / 3 - 0.02) is None
    assert position_answer(0.1, 0.9) == "bottom left"


def test_majority_baseline() -> None:
    sizes = [Question("size", "?", answer) for answer in ("small", "small", "large")]
    assert majority_baseline(sizes) == {"size": 2 / 3}
