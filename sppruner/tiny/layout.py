"""What a scene consists of. Every coordinate is a fraction of the image side, y downwards."""

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
    """One shape. `x`, `y` is its centre."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float  # radians

    @property
    def name(self) -> str:
        """The phrase that names it uniquely within its scene, e.g. `red circle`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A square cream card with one digit and a frame of `color`, centred on (`x`, `y`)."""

    digit: str
    color: str
    x: float
    y: float
    side: float = SIGN_SIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A distractor no question asks about: it has an object's colour but no shape with a name."""

    kind: str
    color: str
    x: float
    y: float
    reach: float  # half its extent
    angle: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The background of the whole image or of one side of it."""

    color: str
    texture: str

    @property
    def name(self) -> str:
        """Texture, then colour: `striped tan`."""
        return f"{self.texture} {self.color}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A straight line between two grounds: x = `at` if upright, else y = `at`."""

    upright: bool
    at: float

    def distance(self, x: float, y: float) -> float:
        """Signed distance of a point from the line, negative on the first ground."""
        return (x if self.upright else y) - self.at


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything visible in one image.

    (Colour, shape) pairs are unique within a scene, and so are the signs' colours. `grounds` has
    one entry, or two with a `split`: left before right, top before bottom.
    """

    seed: int
    grounds: tuple[Ground, ...]
    split: Split | None
    objects: tuple[SceneObject, ...]
    signs: tuple[Sign, ...]
    marks: tuple[Mark, ...]

    def ground_at(self, x: float, y: float) -> int:
        """Index of the ground that lies at a point."""
        return 0 if self.split is None or self.split.distance(x, y) < 0 else 1


def outline(item: SceneObject) -> Points:
    """Corner points of the object (a circle becomes a 40-gon)."""
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
