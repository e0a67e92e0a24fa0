"""Procedural scenes: a few coloured shapes and maybe a numbered sign on a textured background.

A scene is a pure function of its seed and every coordinate is a fraction of the image side, so
labels are exact at any resolution. Seeds from `HELD_OUT_SEED` on are never trained on.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "HELD_OUT_SEED",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Scene",
    "SceneObject",
    "Sign",
    "outline",
    "render",
    "sample_scene",
]

HELD_OUT_SEED: Final = 10_000_000

_RGB: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 90, 230),
    "yellow": (245, 210, 40),
    "white": (250, 250, 250),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "tan": (190, 160, 118),
    "navy": (38, 46, 92),
    "teal": (30, 122, 122),
}
COLORS: Final = ("red", "green", "blue", "yellow", "white", "black")
BACKGROUNDS: Final = ("gray", "tan", "navy", "teal")
SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
SIZES: Final = ("small", "large")
TEXTURES: Final = ("plain", "striped", "checkered", "dotted", "noisy")

_CARD: Final = (255, 244, 214)  # cream: no object has this colour
_SIGN_SIDE: Final = 20 / 96
_GLYPH: Final = 19 / 96
_GRID: Final = 12  # the model's patches per side
_GRID_MARGIN: Final = 1.5 / 96  # object centres stay this far from the patch grid's lines
_MIN_DX: Final = 0.04  # so that "left to right" is never a close call
_SUPERSAMPLE: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One shape. `x`, `y` (centre) and `radius` are fractions of the image side, y downwards."""

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
    """A square cream card with one digit, centred on (`x`, `y`), `side` wide."""

    digit: str
    x: float
    y: float
    side: float = _SIGN_SIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything visible in one image; (colour, shape) pairs are unique within a scene."""

    seed: int
    background: str
    texture: str
    objects: tuple[SceneObject, ...]
    sign: Sign | None


def sample_scene(seed: int) -> Scene:
    """Draw the scene that belongs to `seed`; the same seed gives the same scene everywhere."""
    rng = random.Random(f"scene:{seed}")
    while True:
        scene = _attempt(seed, rng)
        if scene is not None:
            return scene


def _attempt(seed: int, rng: random.Random) -> Scene | None:
    """One draw by rejection; None when the objects found no room."""
    placed: list[tuple[float, float, float]] = []
    sign = None
    if rng.random() < 0.6:
        half = _SIGN_SIDE / 2
        x, y = rng.uniform(half, 1 - half), rng.uniform(half, 1 - half)
        sign = Sign(digit=rng.choice("0123456789"), x=x, y=y)
        placed.append((x, y, half * math.sqrt(2)))
    objects: list[SceneObject] = []
    # More than half of the scenes repeat a shape, or every count question would answer "one".
    common = rng.choice(SHAPES) if rng.random() < 0.55 else None
    taken: set[tuple[str, str]] = set()
    for _ in range(rng.choice((1, 2, 2, 3, 3, 3, 4))):
        shape = common if common and rng.random() < 0.75 else rng.choice(SHAPES)
        color = rng.choice(COLORS)
        if (color, shape) in taken:
            return None
        taken.add((color, shape))
        size = rng.choice(SIZES)
        radius = (rng.uniform(7.5, 9) if size == "small" else rng.uniform(13, 18)) / 96
        spot = _free_spot(rng, radius, placed, [item.x for item in objects])
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
    return Scene(
        seed=seed,
        background=rng.choice(BACKGROUNDS),
        texture=rng.choice(TEXTURES),
        objects=tuple(objects),
        sign=sign,
    )


def _free_spot(
    rng: random.Random,
    radius: float,
    placed: list[tuple[float, float, float]],
    columns: list[float],
) -> tuple[float, float] | None:
    for _ in range(60):
        x, y = (rng.uniform(radius + 0.01, 0.99 - radius) for _ in range(2))
        if min(_grid_gap(x), _grid_gap(y)) < _GRID_MARGIN:
            continue
        if any(abs(x - other) < _MIN_DX for other in columns):
            continue
        if all(math.hypot(x - px, y - py) > radius + pr + 0.015 for px, py, pr in placed):
            return x, y
    return None


def _grid_gap(value: float) -> float:
    """Distance to the nearest line of the patch grid."""
    offset = value * _GRID % 1
    return min(offset, 1 - offset) / _GRID


def outline(item: SceneObject) -> list[tuple[float, float]]:
    """Corner points of the object as fractions of the image (a circle becomes a 40-gon)."""
    angles: list[tuple[float, float]]  # (angle, radius factor), angle 0 pointing up
    if item.shape == "circle":
        angles = [(i * math.tau / 40, 1.0) for i in range(40)]
    elif item.shape == "square":
        angles = [(math.pi / 4 + i * math.pi / 2, 1.0) for i in range(4)]
    elif item.shape == "triangle":
        angles = [(i * math.tau / 3, 1.0) for i in range(3)]
    elif item.shape == "star":
        angles = [(i * math.pi / 5, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    else:  # a plus: arms 0.34 of the radius wide on each side
        tip, inner = math.atan(0.34), 0.34 * math.sqrt(2)
        angles = []
        for i in range(4):
            turn = i * math.pi / 2
            angles += [(turn - tip, 1.0), (turn + tip, 1.0), (turn + math.pi / 4, inner)]
    return [
        (
            item.x + item.radius * factor * math.sin(angle + item.rotation),
            item.y - item.radius * factor * math.cos(angle + item.rotation),
        )
        for angle, factor in angles
    ]


def render(scene: Scene, pixels: int = 192) -> Image.Image:
    """Draw the scene as a square RGB image with `pixels` per side, antialiased."""
    side = pixels * _SUPERSAMPLE
    rng = random.Random(f"render:{scene.seed}")
    image = _background(scene, side, rng)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        fill = _jitter(_RGB[item.color], rng, 8)
        draw.polygon([(x * side, y * side) for x, y in outline(item)], fill=fill)
    if scene.sign is not None:
        _draw_sign(draw, scene.sign, side)
    return image.reduce(_SUPERSAMPLE)


def _draw_sign(draw: ImageDraw.ImageDraw, sign: Sign, side: int) -> None:
    half = sign.side / 2
    left, top = (sign.x - half) * side, (sign.y - half) * side
    right, bottom = (sign.x + half) * side, (sign.y + half) * side
    draw.rectangle((left, top, right, bottom), fill=_CARD, outline=(90, 60, 30), width=side // 120)
    # Pillow's bundled font: the same glyphs on every machine.
    font = ImageFont.load_default(size=_GLYPH * side)
    draw.text(
        (sign.x * side, sign.y * side),
        sign.digit,
        font=font,
        fill=(20, 20, 20),
        anchor="mm",
        stroke_width=side / 240,
    )


def _background(scene: Scene, side: int, rng: random.Random) -> Image.Image:
    base = _jitter(_RGB[scene.background], rng, 6)
    step = 14 if rng.random() < 0.5 else -14
    other = tuple(max(0, min(255, channel + 2 * step)) for channel in base)
    image = Image.new("RGB", (side, side), base)
    draw = ImageDraw.Draw(image)
    cell = side * rng.uniform(0.055, 0.085)
    phase = rng.uniform(0, cell)
    cells = math.ceil(side / cell) + 2
    if scene.texture == "striped":
        upright = rng.random() < 0.5
        for i in range(-1, cells, 2):
            low, high = i * cell + phase, (i + 1) * cell + phase
            draw.rectangle((low, 0, high, side) if upright else (0, low, side, high), fill=other)
    elif scene.texture == "checkered":
        for i in range(-1, cells):
            for j in range(-1 - i % 2, cells, 2):
                x, y = i * cell + phase, j * cell + phase
                draw.rectangle((x, y, x + cell, y + cell), fill=other)
    elif scene.texture == "dotted":
        radius = cell * 0.3
        for i in range(-1, cells):
            for j in range(-1, cells):
                x, y = i * cell + phase, j * cell + phase
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=other)
    elif scene.texture == "noisy":
        noise = np.random.default_rng(rng.getrandbits(32)).integers(-26, 27, (48, 48, 1))
        pixels = np.clip(np.array(base) + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    return image


def _jitter(color: tuple[int, int, int], rng: random.Random, amount: int) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, c + rng.randint(-amount, amount))) for c in color)
    return red, green, blue
