"""Scenes are a pure function of their seed and satisfy what the questions assume."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppruner.tiny.layout import GRID, mark_outline
from sppruner.tiny.scenes import COLORS, SHAPES, SIZES, TEXTURES, render, sample_scene

SEEDS = st.integers(0, 50_000_000)


@given(SEEDS)
def test_same_seed_same_scene(seed: int) -> None:
    assert sample_scene(seed) == sample_scene(seed)


@given(SEEDS)
def test_objects_are_distinct_inside_and_apart(seed: int) -> None:
    scene = sample_scene(seed)
    assert 3 <= len(scene.objects) <= 9
    assert len({item.name for item in scene.objects}) == len(scene.objects)
    for index, item in enumerate(scene.objects):
        assert item.color in COLORS
        assert item.shape in SHAPES
        assert item.size in SIZES
        assert item.radius <= item.x <= 1 - item.radius
        assert item.radius <= item.y <= 1 - item.radius
        for other in scene.objects[:index]:
            gap = math.hypot(item.x - other.x, item.y - other.y)
            assert gap > item.radius + other.radius
            assert abs(item.x - other.x) >= 0.04 or len(scene.objects) > 3


@given(SEEDS)
def test_centres_are_away_from_the_patch_grid_s_lines(seed: int) -> None:
    scene = sample_scene(seed)
    centres = [(o.x, o.y) for o in scene.objects] + [(s.x, s.y) for s in scene.signs]
    for centre in centres:
        for value in centre:
            assert abs(value * GRID - round(value * GRID)) / GRID >= 1.5 / 96 - 1e-9


@given(SEEDS)
def test_distractors_touch_no_object_or_sign(seed: int) -> None:
    scene = sample_scene(seed)
    for mark in scene.marks:
        for x, y in mark_outline(mark):
            for item in scene.objects:
                assert math.hypot(x - item.x, y - item.y) > item.radius
            for sign in scene.signs:
                assert max(abs(x - sign.x), abs(y - sign.y)) > sign.side / 2


@given(SEEDS)
def test_captioned_scenes_are_simple_and_signs_have_unique_colours(seed: int) -> None:
    scene = sample_scene(seed)
    assert len({sign.color for sign in scene.signs}) == len(scene.signs) <= 2
    assert len(scene.grounds) == (1 if scene.split is None else 2)
    assert len({ground.color for ground in scene.grounds}) == len(scene.grounds)
    if len(scene.objects) == 3:
        assert scene.split is None
        assert len(scene.signs) <= 1


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_rendering_is_deterministic(seed: int) -> None:
    scene = sample_scene(seed)
    assert render(scene).tobytes() == render(scene).tobytes()


@pytest.mark.parametrize("pixels", [96, 192, 333])
def test_rendering_has_the_requested_size(pixels: int) -> None:
    assert render(sample_scene(3), pixels).size == (pixels, pixels)


def test_the_pixel_at_an_object_s_centre_has_its_colour() -> None:
    channel = {"red": 0, "green": 1, "blue": 2}
    checked = 0
    for seed in range(60):
        scene = sample_scene(seed)
        image = np.asarray(render(scene), dtype=int)
        for item in scene.objects:
            pixel = image[int(item.y * 192), int(item.x * 192)]
            if item.color in channel:
                assert pixel.argmax() == channel[item.color]
                checked += 1
            elif item.color == "white":
                assert pixel.min() > 230
            elif item.color == "black":
                assert pixel.max() < 40
    assert checked > 20


def test_every_texture_and_count_occurs() -> None:
    scenes = [sample_scene(seed) for seed in range(300)]
    assert {ground.texture for scene in scenes for ground in scene.grounds} == set(TEXTURES)
    assert {len(scene.objects) for scene in scenes} == set(range(3, 10))
    assert {len(scene.signs) for scene in scenes} == {0, 1, 2}
    assert {mark.kind for scene in scenes for mark in scene.marks} == {"stroke", "dot", "arc"}
    assert 0.3 < sum(scene.split is not None for scene in scenes) / len(scenes) < 0.6
