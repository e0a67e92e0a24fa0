"""Procedural scenes: coloured shapes, numbered signs and distractors on busy backgrounds.

A scene is a pure function of its seed, and every coordinate is a fraction of the image side, so
labels are exact at any resolution. Training never uses seeds from `HELD_OUT_SEED` on. Scenes of
three objects are simple (one ground, at most one sign); captions are about those scenes only.
"""

from __future__ import annotations

import math
import random
from typing import Final

from sppruner.tiny.drawing import JPEG_QUALITY, encode_scene, render
from sppruner.tiny.layout import (
    BACKGROUNDS,
    COLORS,
    GRID,
    MARKS,
    SHAPES,
    SIGN_COLORS,
    SIGN_SIDE,
    SIZES,
    TEXTURES,
    Ground,
    Mark,
    Scene,
    SceneObject,
    Sign,
    Split,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "FEWEST_OBJECTS",
    "HELD_OUT_SEED",
    "JPEG_QUALITY",
    "MOST_OBJECTS",
    "MOST_SIGNS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Scene",
    "SceneObject",
    "Sign",
    "encode_scene",
    "render",
    "sample_scene",
]

HELD_OUT_SEED: Final = 10_000_000
FEWEST_OBJECTS: Final = 3
MOST_OBJECTS: Final = 9
MOST_SIGNS: Final = 2

_OBJECTS: Final = (3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9)
_RADII: Final = {"small": (6.5, 7.5), "large": (10.5, 13.0)}  # in pixels of 96
_GRID_MARGIN: Final = 1.5 / 96  # least distance of object centres from the patch grid's lines
_MIN_DX: Final = 0.04  # so that the order from left to right in a caption is unambiguous
_GAP: Final = 1.5 / 96

_Disc = tuple[float, float, float]  # x, y, radius


def sample_scene(seed: int) -> Scene:
    """The scene of a seed; the same seed gives the same scene on every machine."""
    rng = random.Random(f"scene:{seed}")
    count = rng.choice(_OBJECTS)
    while True:
        scene = _attempt(seed, count, rng)
        if scene is not None:
            return scene


def _attempt(seed: int, count: int, rng: random.Random) -> Scene | None:
    """One draw by rejection sampling; None if an object does not fit."""
    simple = count == FEWEST_OBJECTS
    placed: list[_Disc] = []
    signs = _signs(rng, 1 if simple else MOST_SIGNS, placed)
    objects: list[SceneObject] = []
    for color, shape in _names(rng, count):
        size = rng.choice(SIZES)
        low, high = _RADII[size]
        radius = rng.uniform(low, high) / 96
        spot = _free_spot(rng, radius, placed, [item.x for item in objects] if simple else [])
        if spot is None:
            return None
        placed.append((*spot, radius))
        rotation = rng.uniform(-0.15, 0.15)
        objects.append(
            SceneObject(
                color=color,
                shape=shape,
                size=size,
                x=spot[0],
                y=spot[1],
                radius=radius,
                rotation=rotation,
            )
        )
    split = None
    if not simple and rng.random() < 0.6:
        split = Split(upright=rng.random() < 0.5, at=rng.uniform(0.35, 0.65))
    colors = rng.sample(BACKGROUNDS, 1 if split is None else 2)
    return Scene(
        seed=seed,
        grounds=tuple(Ground(color=c, texture=rng.choice(TEXTURES)) for c in colors),
        split=split,
        objects=tuple(objects),
        signs=signs,
        marks=_marks(rng, placed),
    )


def _names(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Distinct (colour, shape) pairs, often several of one shape or colour for counting."""
    names: list[tuple[str, str]] = []
    common = rng.choice((*SHAPES, *COLORS, ""))
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    while len(names) < count:
        left = [pair for pair in pairs if pair not in names]
        alike = [pair for pair in left if common in pair]
        few = sum(common in pair for pair in names) < 4
        names.append(rng.choice(alike if alike and few and rng.random() < 0.6 else left))
    return names


def _signs(rng: random.Random, most: int, placed: list[_Disc]) -> tuple[Sign, ...]:
    half = SIGN_SIDE / 2
    signs: list[Sign] = []
    for color in rng.sample(SIGN_COLORS, min(most, rng.choice((0, 1, 1, 2, 2)))):
        spot = _free_spot(rng, half * math.sqrt(2), placed, [], edge=half)
        if spot is not None:
            signs.append(Sign(digit=rng.choice("0123456789"), color=color, x=spot[0], y=spot[1]))
            placed.append((*spot, half * math.sqrt(2)))
    return tuple(signs)


def _marks(rng: random.Random, placed: list[_Disc]) -> tuple[Mark, ...]:
    marks = []
    for _ in range(rng.randint(6, 16)):
        kind = rng.choice(MARKS)
        reach = (rng.uniform(1.3, 2.0) if kind == "dot" else rng.uniform(2.8, 8.0)) / 96
        x, y = rng.random(), rng.random()
        if all(math.hypot(x - px, y - py) > reach + pr + _GAP for px, py, pr in placed):
            color, angle = rng.choice(COLORS), rng.uniform(0, math.tau)
            marks.append(Mark(kind=kind, color=color, x=x, y=y, reach=reach, angle=angle))
    return tuple(marks)


def _free_spot(
    rng: random.Random,
    radius: float,
    placed: list[_Disc],
    columns: list[float],
    edge: float | None = None,
) -> tuple[float, float] | None:
    """A centre outside all discs, away from used columns and at least `edge` from the border; None
    after 60 attempts."""
    edge = radius + 0.01 if edge is None else edge
    for _ in range(60):
        x, y = (rng.uniform(edge, 1 - edge) for _ in range(2))
        if min(_grid_gap(x), _grid_gap(y)) < _GRID_MARGIN:
            continue
        if any(abs(x - other) < _MIN_DX for other in columns):
            continue
        if all(math.hypot(x - px, y - py) > radius + pr + _GAP for px, py, pr in placed):
            return x, y
    return None


def _grid_gap(value: float) -> float:
    """Distance to the nearest line of the patch grid."""
    offset = value * GRID % 1
    return min(offset, 1 - offset) / GRID
