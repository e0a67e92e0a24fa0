"""Drawn scenes as a dataset: held out, in two disjoint splits, with outlines of the subjects."""

from __future__ import annotations

import pytest

from sppruner.errors import SpecError
from sppruner.evaluation.drawn_scenes import CAPTION, SPLIT_SCENES, drawn_scenes, subject_outlines
from sppruner.tiny.questions import NUMBERS, questions
from sppruner.tiny.scenes import HELD_OUT_SEED, sample_scene


def test_scenes_are_held_out_complete_and_reproducible() -> None:
    dataset = drawn_scenes(50, first_scene=7)
    assert min(int(item.group) for item in dataset.items) == HELD_OUT_SEED + 7
    assert dataset.question_count >= 50
    again = drawn_scenes(50, first_scene=7)
    assert [(i.prompt, i.answers) for i in dataset.items] == [
        (i.prompt, i.answers) for i in again.items
    ]
    assert {item.kind for item in dataset.items if item.separate} == {CAPTION}
    assert set(dataset.majority_baseline()) == {item.kind for item in dataset.items}


def test_no_scene_is_in_both_splits() -> None:
    tuning = drawn_scenes(50, split="tuning")
    assert min(int(item.group) for item in tuning.items) == HELD_OUT_SEED + SPLIT_SCENES
    last = drawn_scenes(1, first_scene=SPLIT_SCENES - 1)
    assert max(int(item.group) for item in last.items) < HELD_OUT_SEED + SPLIT_SCENES
    with pytest.raises(SpecError, match="outside"):
        drawn_scenes(1, first_scene=SPLIT_SCENES)


def test_questions_have_the_outlines_of_the_objects_that_decide_them() -> None:
    """Two for a relation or a neighbour, the number counted for a count, none for the ground."""
    counts_by_kind: dict[str, set[int]] = {}
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 60):
        scene = sample_scene(seed)
        for question in questions(scene):
            count = len(subject_outlines(scene, question))
            if question.kind == "count":
                assert NUMBERS[count] == question.answer
            elif question.answer != "no":
                counts_by_kind.setdefault(question.kind, set()).add(count)
    assert counts_by_kind.pop("background") == {0}
    assert counts_by_kind.pop("relation") == counts_by_kind.pop("nearest") == {2}
    assert set(counts_by_kind) == {
        "size", "existence", "shape", "colour", "position", "text", "behind"
    }  # fmt: skip
    assert all(counts == {1} for counts in counts_by_kind.values())


def test_an_outline_lies_where_the_object_is_drawn() -> None:
    """The pixels inside the outline of an object have its colour."""
    items = drawn_scenes(200).items
    item = next(i for i in items if i.prompt.startswith("is there a red") and i.subjects)
    corners = item.subjects[0]
    x = sum(corner[0] for corner in corners) / len(corners)
    y = sum(corner[1] for corner in corners) / len(corners)
    image = item.image()
    pixel = image.getpixel((int(x * image.width), int(y * image.height)))
    assert isinstance(pixel, tuple)
    red, green, blue = pixel
    assert red > 150 > green
    assert blue < 150
