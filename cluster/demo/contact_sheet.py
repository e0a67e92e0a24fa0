"""A PNG of labelled images with their texts: the quickest way to judge a run by eye."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

_CELL = 240
_MARGIN = 12
_LINE = 15
_CHARACTERS = 36
_PAPER, _INK, _RED = (255, 255, 255), (20, 20, 20), (180, 20, 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One picture of the sheet with its lines of text."""

    image: Image.Image | None
    """None draws an empty frame: the row could not be read."""
    title: str
    """The first line below the image."""
    text: str
    """The lines after it, wrapped to the tile's width."""
    failed: bool = False
    """Whether the lines are red."""


def draw_contact_sheet(tiles: Sequence[Tile], *, columns: int = 4) -> Image.Image:
    """Draws the tiles row by row; texts are wrapped, never cut."""
    font = ImageFont.load_default(size=12)
    wrapped = [[t.title, *textwrap.wrap(t.text, _CHARACTERS)] for t in tiles]
    rows = [
        range(index, min(index + columns, len(tiles))) for index in range(0, len(tiles), columns)
    ]
    heights = [_CELL + _MARGIN + _LINE * max(len(wrapped[index]) for index in row) for row in rows]
    width = columns * (_CELL + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN * (len(rows) + 1)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = _MARGIN + column * (_CELL + _MARGIN)
            image = tiles[index].image
            if image is None:
                draw.rectangle((left, top, left + _CELL, top + _CELL), outline=_RED)
            else:
                fitted = ImageOps.contain(image, (_CELL, _CELL))
                sheet.paste(fitted, (left, top))
            ink = _RED if tiles[index].failed else _INK
            for line, text in enumerate(wrapped[index]):
                draw.text((left, top + _CELL + 4 + line * _LINE), text, fill=ink, font=font)
        top += height + _MARGIN
    return sheet


def write_contact_sheet(tiles: Sequence[Tile], path: Path, *, columns: int = 4) -> Path:
    """Writes the sheet to `path`, creating its folder, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_contact_sheet(tiles, columns=columns).save(path)
    return path
