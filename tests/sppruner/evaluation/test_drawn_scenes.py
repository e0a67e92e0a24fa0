"""Drawn scenes as a dataset: held out, in two disjoint splits, with outlines of what is asked."""

from __future__ import annotations

import pytest

from sppruner.errors import SpecError
from sppruner.evaluation.drawn_scenes import CAPTION, SPLIT_SCENES, drawn_scenes, subjects
from sppruner.tiny.questions import NUMBERS, questions
from sppruner.tiny.scenes import HELD_OUT_SEED, sample_scene


def test_scenes_are_held_out_whole_and_enough() -> None:
    asked = drawn_scenes(50, first_scene=7)
    assert min(int(item.group) for item in asked.items) == HELD_OUT_SEED + 7
    assert asked.questions >= 50
    again = drawn_scenes(50, first_scene=7)
    assert [(i.prompt, i.answers) for i in asked.items] == [
        (i.prompt, i.answers) for i in again.items
    ]
    assert {item.kind for item in asked.items if item.apart} == {CAPTION}
    assert set(asked.majority()) == {item.kind for item in asked.items}


def test_no_scene_is_in_both_splits() -> None:
    tuning = drawn_scenes(50, split="tuning")
    assert min(int(item.group) for item in tuning.items) == HELD_OUT_SEED + SPLIT_SCENES
    last = drawn_scenes(1, first_scene=SPLIT_SCENES - 1)
    assert max(int(item.group) for item in last.items) < HELD_OUT_SEED + SPLIT_SCENES
    with pytest.raises(SpecError, match="outside"):
        drawn_scenes(1, first_scene=SPLIT_SCENES)


def test_questions_know_the_things_that_decide_them() -> None:
    """Two for a relation or a neighbour, as many as are counted, none for the ground alone."""
    found: dict[str, set[int]] = {}
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 60):
        scene = sample_scene(seed)
        for question in questions(scene):
            things = len(subjects(scene, question))
            if question.kind == "count":
                assert NUMBERS[things] == question.answer
            elif question.answer != "no":
                found.setdefault(question.kind, set()).add(things)
    assert found.pop("background") == {0}
    assert found.pop("relation") == found.pop("nearest") == {2}
    assert set(found) == {
        "size", "existence", "shape", "colour", "position", "text", "behind"
    }  # fmt: skip
    assert all(counts == {1} for counts in found.values())


def test_an_outline_lies_where_the_object_is_drawn() -> None:
    """The pixels inside the outline of an object have its colour."""
    items = drawn_scenes(200).items
    item = next(i for i in items if i.prompt.startswith("is there a red") and i.subjects)
    corners = item.subjects[0]
    x = sum(corner[0] for corner in corners) / len(corners)
    y = sum(corner[1] for corner in corners) / len(corners)
    image = item.image()
    red, green, blue = image.getpixel((int(x * image.width), int(y * image.height)))
    assert red > 150 > green
    assert blue < 150
