"""Renders a scene: grounds, then distractors, then objects and signs, antialiased."""

from __future__ import annotations

import io
import math
import random
from typing import Final, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sppruner.tiny.layout import Ground, Scene, Sign, mark_outline, outline

__all__ = ["JPEG_QUALITY", "encode_scene", "render"]

JPEG_QUALITY: Final = 92
"""JPEG quality of held-out scenes, wherever they are encoded."""

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
_CARD: Final = (255, 244, 214)  # cream, which no object has
_GLYPH: Final = 19 / 96
_FRAME: Final = 2 / 96
_SUPERSAMPLE: Final = 2


def render(scene: Scene, pixels: int = 192) -> Image.Image:
    """The scene as a square RGB image with `pixels` per side."""
    side = pixels * _SUPERSAMPLE
    rng = random.Random(f"render:{scene.seed}")
    image = _background(scene, side, rng)
    draw = ImageDraw.Draw(image)
    polygons = [(mark.color, mark_outline(mark)) for mark in scene.marks]
    polygons += [(item.color, outline(item)) for item in scene.objects]
    for color, corners in polygons:
        draw.polygon([(x * side, y * side) for x, y in corners], fill=_jitter(_RGB[color], rng, 8))
    for sign in scene.signs:
        _draw_sign(draw, sign, side)
    return image.reduce(_SUPERSAMPLE)


def encode_scene(
    scene: Scene,
    pixels: int = 192,
    *,
    format: Literal["JPEG", "PNG"] = "JPEG",
    quality: int = JPEG_QUALITY,
) -> bytes:
    """The rendered scene as an image file of `pixels` per side; `quality` applies to JPEG only.

    Published scores depend on these bytes: tests/sppruner/tiny/test_encoding.py pins them.
    """
    buffer = io.BytesIO()
    options = {"quality": quality} if format == "JPEG" else {}
    render(scene, pixels).save(buffer, format, **options)
    return buffer.getvalue()


def _draw_sign(draw: ImageDraw.ImageDraw, sign: Sign, side: int) -> None:
    half = sign.side / 2
    box = [(sign.x - half) * side, (sign.y - half) * side]
    box += [(sign.x + half) * side, (sign.y + half) * side]
    draw.rectangle(box, fill=_CARD, outline=_RGB[sign.color], width=round(_FRAME * side))
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
    image = _texture(scene.grounds[0], side, rng)
    if scene.split is not None:
        second = _texture(scene.grounds[1], side, rng)
        edge = round(scene.split.at * side)
        box = (edge, 0, side, side) if scene.split.upright else (0, edge, side, side)
        image.paste(second.crop(box), box[:2])
    return image


def _texture(ground: Ground, side: int, rng: random.Random) -> Image.Image:
    """Two shades of the ground's colour in its pattern, under a brightness gradient."""
    base = _jitter(_RGB[ground.color], rng, 6)
    step = rng.randint(24, 38) * rng.choice((-1, 1))
    other = tuple(max(0, min(255, channel + step)) for channel in base)
    image = Image.new("RGB", (side, side), base)
    draw = ImageDraw.Draw(image)
    cell = side * rng.uniform(0.055, 0.085)
    phase = rng.uniform(0, cell)
    cells = math.ceil(side / cell) + 2
    if ground.texture == "striped":
        upright = rng.random() < 0.5
        for i in range(-1, cells, 2):
            low, high = i * cell + phase, (i + 1) * cell + phase
            draw.rectangle((low, 0, high, side) if upright else (0, low, side, high), fill=other)
    elif ground.texture == "checkered":
        for i in range(-1, cells):
            for j in range(-1 - i % 2, cells, 2):
                x, y = i * cell + phase, j * cell + phase
                draw.rectangle((x, y, x + cell, y + cell), fill=other)
    elif ground.texture == "dotted":
        radius = cell * 0.3
        for i in range(-1, cells):
            for j in range(-1, cells):
                x, y = i * cell + phase, j * cell + phase
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=other)
    elif ground.texture == "noisy":
        noise = np.random.default_rng(rng.getrandbits(32)).integers(-30, 31, (48, 48, 1))
        pixels = np.clip(np.array(base) + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    return _lit(image, rng)


def _lit(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image blended with up to 10 % black at one end and 10 % white at the other."""
    ends = [(0, 0, 0), (255, 255, 255)]
    rng.shuffle(ends)
    ramp = np.linspace(25, 0, 16), np.linspace(0, 25, 16)
    upright = rng.random() < 0.5
    for color, strength in zip(ends, ramp, strict=True):
        row = strength.astype(np.uint8)
        small = Image.fromarray(row[None] if upright else row[:, None])
        image.paste(color, mask=small.resize(image.size, Image.Resampling.BILINEAR))
    return image


def _jitter(color: tuple[int, int, int], rng: random.Random, amount: int) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, c + rng.randint(-amount, amount))) for c in color)
    return red, green, blue
