"""Picture of a selection: focus, context, merged and dropped visual tokens of one image.

Dropped patches are faded and grey; kept patches are unchanged, with a line around each connected
region of one kind. Every view of the image that the language model reads is drawn: tiles together
in one panel, low-resolution views in panels beside it.

Shapes: R rows and C columns of a plane's grid, N visual tokens, K kept tokens, P tokens of one
plane, D width of the language model, V width of the vision encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sppruner.errors import InputError
from sppruner.pictures.geometry import WHOLE, Box, plane_boxes
from sppruner.types import Selection, VisualTokens

Colour: TypeAlias = tuple[int, int, int]

DROPPED, KEPT, FOCUS, CONTEXT = range(4)
# Okabe and Ito's vermilion, sky blue and green: distinct for most readers, on dark patches too.
_LINES: dict[int, Colour] = {KEPT: (86, 180, 233), FOCUS: (213, 94, 0), CONTEXT: (86, 180, 233)}
_MERGED: Colour = (0, 158, 115)
_NAMES = {FOCUS: "focus", CONTEXT: "context", KEPT: "kept"}
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
_FADED = 0.68  # share of the background colour blended into a dropped patch
_GAP = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cells:
    """The tokens of one plane on its grid. kind_RC: DROPPED, KEPT, FOCUS or CONTEXT, -1 where the
    plane has no token. merged_RC: kept tokens with replaced features."""

    kind_RC: np.ndarray
    merged_RC: np.ndarray


def overlay(
    image: Image.Image,
    selections: Sequence[tuple[VisualTokens, Selection]],
    *,
    side: int = 480,
    key: bool = True,
) -> Image.Image:
    """Draws the selections of one image (`Prepared.selections`), planes in order.

    image: as the encoder sees it (`geometry.visible_crop`). side: pixels of a panel's longer side.
    key: whether to add a legend below. Raises InputError without selections.
    """
    if not selections:
        raise InputError("nothing to draw: the prompt has no image, or its spec is dense")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    whole = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    cells = [_cells(plane, choice) for plane, choice in selections]
    boxes = plane_boxes([plane for plane, _ in selections], image.size)
    panels = [_panel(whole, members) for members in _panels(cells, boxes)]
    width = sum(p.width for p in panels) + _GAP * (len(panels) - 1)
    strip = legend(count_kinds(selections), width) if key else None
    height = size[1] + (0 if strip is None else strip.height)
    picture = Image.new("RGB", (width, height), _PAPER)
    left = 0
    for panel in panels:
        picture.paste(panel, (left, 0))
        left += panel.width + _GAP
    if strip is not None:
        picture.paste(strip, (0, size[1]))
    return picture


def count_kinds(selections: Sequence[tuple[VisualTokens, Selection]]) -> dict[str, int]:
    """The number of tokens of each kind by its name in the legend, kinds without a token left out.
    A merged token counts as merged and as its own kind."""
    planes = [_cells(plane, choice) for plane, choice in selections]
    counts = {name: sum(int((c.kind_RC == k).sum()) for c in planes) for k, name in _NAMES.items()}
    counts["merged"] = sum(int(c.merged_RC.sum()) for c in planes)
    counts["dropped"] = sum(int((c.kind_RC == DROPPED).sum()) for c in planes)
    return {name: count for name, count in counts.items() if count}


def _cells(plane: VisualTokens, choice: Selection) -> _Cells:
    kind_RC = np.full(plane.grid, -1)
    merged_RC = np.zeros(plane.grid, dtype=bool)
    row_N, column_N = plane.coords_N2.cpu().numpy().T
    kind_RC[row_N, column_N] = DROPPED
    index_K = choice.index_K.cpu().numpy()
    kinds_K = np.full(len(index_K), KEPT)
    if choice.focus_K is not None:
        kinds_K = np.where(choice.focus_K.cpu().numpy(), FOCUS, CONTEXT)
    kind_RC[row_N[index_K], column_N[index_K]] = kinds_K
    merged_RC[row_N[index_K], column_N[index_K]] = _replaced_K(plane, choice).cpu().numpy()
    return _Cells(kind_RC=kind_RC, merged_RC=merged_RC)


def _replaced_K(plane: VisualTokens, choice: Selection) -> torch.Tensor:
    """[K] bool: kept tokens whose features differ from the encoder's."""
    for new, old in (
        (choice.replace_KD, plane.features_ND),
        (choice.replace_KV, plane.hidden_NV),
    ):
        if new is not None and old is not None:
            return (new.to(old.dtype) != old[choice.index_K]).any(dim=1)
    return torch.zeros(choice.count, dtype=torch.bool)


def _panels(cells: Sequence[_Cells], boxes: Sequence[Box]) -> list[list[tuple[_Cells, Box]]]:
    """Tiles share one panel; each view of the whole image has its own."""
    tiles = [pair for pair in zip(cells, boxes, strict=True) if pair[1] != WHOLE]
    wholes = [[pair] for pair in zip(cells, boxes, strict=True) if pair[1] == WHOLE]
    return ([tiles] if tiles else []) + wholes


def _panel(whole: Image.Image, members: Sequence[tuple[_Cells, Box]]) -> Image.Image:
    grey = whole.convert("L").convert("RGB")
    panel = Image.blend(grey, Image.new("RGB", whole.size, _PAPER), _FADED)
    draw = ImageDraw.Draw(panel)
    line = max(1, round(max(whole.size) / 150))
    for cells, box in members:
        edges_x, edges_y = _edges(cells.kind_RC.shape, box, whole.size)
        if box != WHOLE:
            draw.rectangle((edges_x[0], edges_y[0], edges_x[-1], edges_y[-1]), outline=_PAPER)
        kept = [
            (row, column, (edges_x[column], edges_y[row], edges_x[column + 1], edges_y[row + 1]))
            for row, column in np.argwhere(cells.kind_RC > DROPPED).tolist()
        ]
        for _, _, patch in kept:
            panel.paste(whole.crop(patch), patch[:2])
        for row, column, patch in kept:
            _outline(draw, cells.kind_RC, row, column, patch, line)
        for row, column in np.argwhere(cells.merged_RC):
            x = (edges_x[column] + edges_x[column + 1]) / 2
            y = (edges_y[row] + edges_y[row + 1]) / 2
            radius = max(1.5, 0.13 * (edges_x[column + 1] - edges_x[column]))
            _dot(draw, x, y, radius)
    return panel


def _edges(grid: tuple[int, ...], box: Box, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Pixel borders of a plane's columns and rows."""
    rows, columns = grid
    left, top, right, bottom = box
    xs = [round((left + (right - left) * c / columns) * size[0]) for c in range(columns + 1)]
    ys = [round((top + (bottom - top) * r / rows) * size[1]) for r in range(rows + 1)]
    return xs, ys


def _outline(
    draw: ImageDraw.ImageDraw,
    kind_RC: np.ndarray,
    row: int,
    column: int,
    patch: tuple[int, int, int, int],
    line: int,
) -> None:
    """A line inside the patch along each side that borders on another kind."""
    framed = np.pad(kind_RC, 1, constant_values=-1)
    above, below = framed[row, column + 1], framed[row + 2, column + 1]
    before, after = framed[row + 1, column], framed[row + 1, column + 2]
    kind = int(kind_RC[row, column])
    left, top, right, bottom = patch
    for neighbour, side in (
        (above, (left, top, right - 1, top + line - 1)),
        (below, (left, bottom - line, right - 1, bottom - 1)),
        (before, (left, top, left + line - 1, bottom - 1)),
        (after, (right - line, top, right - 1, bottom - 1)),
    ):
        if neighbour != kind:
            draw.rectangle(side, fill=_LINES[kind])


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    draw.ellipse((x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1), fill=_PAPER)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_MERGED)


def legend(counts: Mapping[str, int | None], width: int) -> Image.Image:
    """A strip with the colour and name of each kind, and its number of tokens unless None; wraps at
    `width` pixels."""
    font = ImageFont.load_default(size=13)
    swatch, height = 13, 24
    entries = [(name, name if n is None else f"{name} {n}") for name, n in counts.items()]
    places: list[tuple[int, int]] = []
    x = y = 0
    for _, text in entries:
        wide = swatch + 6 + round(font.getlength(text)) + 16
        if x and x + wide - 16 > width:
            x, y = 0, y + height
        places.append((x, y))
        x += wide
    strip = Image.new("RGB", (width, y + height + 4), _PAPER)
    draw = ImageDraw.Draw(strip)
    colours = {name: _LINES[kind] for kind, name in _NAMES.items()}
    for (name, text), (left, top) in zip(entries, places, strict=True):
        box = (left, top + 8, left + swatch - 1, top + 8 + swatch - 1)
        if name == "merged":
            _dot(draw, left + swatch / 2, top + 8 + swatch / 2, 4)
        elif name == "dropped":
            draw.rectangle(box, fill=(228, 228, 228))
        else:
            draw.rectangle(box, outline=colours[name], width=2)
        draw.text((left + swatch + 6, top + 6), text, fill=_INK, font=font)
    return strip
