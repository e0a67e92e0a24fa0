"""The parts of a scene. Coordinates and lengths are fractions of the image side; y points down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "GRID",
    "MARKS",
    "SHAPES",
    "SIGN_COLORS",
    "SIGN_SIDE",
    "SIZES",
    "TEXTURES",
    "Ground",
    "Mark",
    "Points",
    "Scene",
    "SceneObject",
    "Sign",
    "Split",
    "mark_outline",
    "outline",
]

Points = list[tuple[float, float]]

COLORS: Final = ("red", "green", "blue", "yellow", "white", "black")
BACKGROUNDS: Final = ("gray", "tan", "navy", "teal")
SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
SIZES: Final = ("small", "large")
TEXTURES: Final = ("plain", "striped", "checkered", "dotted", "noisy")
MARKS: Final = ("stroke", "dot", "arc")
SIGN_COLORS: Final = ("red", "green", "blue", "black")

GRID: Final = 12
"""Patches per side as the models see a square scene."""
SIGN_SIDE: Final = 22 / 96


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One coloured shape."""

    color: str
    """One of COLORS."""
    shape: str
    """One of SHAPES."""
    size: str
    """One of SIZES."""
    x: float
    """Centre, from the left."""
    y: float
    """Centre, from the top."""
    radius: float
    """Distance of the outermost corner from the centre."""
    rotation: float
    """Clockwise, in radians."""

    @property
    def name(self) -> str:
        """Its name, unique within the scene, such as `red circle`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A square cream card with one digit and a coloured frame."""

    digit: str
    """One of 0 to 9."""
    color: str
    """Colour of the frame, one of SIGN_COLORS."""
    x: float
    """Centre, from the left."""
    y: float
    """Centre, from the top."""
    side: float = SIGN_SIDE
    """Length of a side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A distractor: it has an object's colour but none of SHAPES, and no question is about it."""

    kind: str
    """One of MARKS."""
    color: str
    """One of COLORS."""
    x: float
    """Centre, from the left."""
    y: float
    """Centre, from the top."""
    reach: float
    """Half its extent."""
    angle: float
    """Direction of a stroke, start of an arc, in radians."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The background of the whole image, or of one side of a split."""

    color: str
    """One of BACKGROUNDS."""
    texture: str
    """One of TEXTURES."""

    @property
    def name(self) -> str:
        """Texture and colour, such as `striped tan`."""
        return f"{self.texture} {self.color}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A straight line between two grounds."""

    upright: bool
    """Whether the line is vertical."""
    at: float
    """The line is x = `at` if upright, else y = `at`."""

    def distance(self, x: float, y: float) -> float:
        """Signed distance of a point from the line, negative on the first ground's side."""
        return (x if self.upright else y) - self.at


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything visible in one image."""

    seed: int
    """The seed that the scene is a function of."""
    grounds: tuple[Ground, ...]
    """One, or two with a split: left before right, top before bottom."""
    split: Split | None
    """The line between two grounds; None for one ground."""
    objects: tuple[SceneObject, ...]
    """Their (colour, shape) pairs are unique."""
    signs: tuple[Sign, ...]
    """Their frame colours are unique."""
    marks: tuple[Mark, ...]
    """Distractors."""

    def ground_at(self, x: float, y: float) -> int:
        """Index of the ground at a point."""
        return 0 if self.split is None or self.split.distance(x, y) < 0 else 1


def outline(item: SceneObject) -> Points:
    """Corner points of the object; a circle is a 40-gon."""
    corners: list[tuple[float, float]]  # (angle, radius factor), angle 0 pointing up
    if item.shape == "circle":
        corners = [(i * math.tau / 40, 1.0) for i in range(40)]
    elif item.shape == "square":
        corners = [(math.pi / 4 + i * math.pi / 2, 1.0) for i in range(4)]
    elif item.shape == "triangle":
        corners = [(i * math.tau / 3, 1.0) for i in range(3)]
    elif item.shape == "star":
        corners = [(i * math.pi / 5, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    else:  # a plus: arms 0.34 of the radius wide on each side
        tip, inner = math.atan(0.34), 0.34 * math.sqrt(2)
        corners = []
        for i in range(4):
            turn = i * math.pi / 2
            corners += [(turn - tip, 1.0), (turn + tip, 1.0), (turn + math.pi / 4, inner)]
    return [
        (
            item.x + item.radius * factor * math.sin(angle + item.rotation),
            item.y - item.radius * factor * math.cos(angle + item.rotation),
        )
        for angle, factor in corners
    ]


def mark_outline(mark: Mark) -> Points:
    """Corner points of a distractor, about two pixels (of 96) thick."""
    half = 1.1 / 96
    if mark.kind == "dot":
        return [_at(mark, mark.reach, i * math.tau / 10) for i in range(10)]
    if mark.kind == "stroke":
        cos, sin = math.cos(mark.angle), math.sin(mark.angle)
        ends = ((mark.reach, half), (mark.reach, -half), (-mark.reach, -half), (-mark.reach, half))
        return [
            (mark.x + far * cos - wide * sin, mark.y + far * sin + wide * cos) for far, wide in ends
        ]
    turns = [mark.angle + i * 2.4 / 8 for i in range(9)]
    outer = [_at(mark, mark.reach + half, turn) for turn in turns]
    return outer + [_at(mark, mark.reach - half, turn) for turn in reversed(turns)]


def _at(mark: Mark, radius: float, angle: float) -> tuple[float, float]:
    return mark.x + radius * math.cos(angle), mark.y + radius * math.sin(angle)
