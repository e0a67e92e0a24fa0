"""Pictures of what methods keep: a few images × every method, one sheet per model and budget."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from cluster.contact_sheet import Tile, contact_sheet
from sppruner.engine.loading import LoadedModel
from sppruner.errors import SpprunerError
from sppruner.evaluation import Dataset, Item, label
from sppruner.geometry import seen
from sppruner.overlay import counts_of, legend, overlay, selections_of
from sppruner.pruner import Pruner
from sppruner.spec import PruneSpec

_IMAGES = 4
_SIDE = 240  # of a tile on the sheet
_MARGIN = 12


def write_overlays(
    loaded: LoadedModel, dataset: Dataset, specs: Sequence[PruneSpec], folder: Path
) -> list[Path]:
    """Sheets `<model>-<retained>.png`: a row per image, the image itself and then each method.

    A method that the model cannot run leaves an empty frame with the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    name = re.sub(r"[^\w.-]+", "-", loaded.identity.name).strip("-")
    written = []
    for budget in dict.fromkeys(spec.budget.ratio for spec in specs):
        members = [spec for spec in specs if spec.budget.ratio == budget]
        tiles = []
        for item in _one_per_image(dataset)[:_IMAGES]:
            image = seen(item.image(), loaded.processor.image_processor)
            tiles.append(Tile(image=_fitted(image), title=item.kind, text=item.prompt))
            tiles += [_tile(pruner, loaded, item, spec) for spec in members]
        written.append(folder / f"{name}-{budget}.png")
        _with_legend(contact_sheet(tiles, columns=1 + len(members))).save(written[-1])
    return written


def _tile(pruner: Pruner, loaded: LoadedModel, item: Item, spec: PruneSpec) -> Tile:
    title, image = label(spec.method, spec.options), item.image()
    try:
        selections = selections_of(pruner, loaded.processor, image, item.prompt, spec)
    except SpprunerError as error:
        return Tile(image=None, title=title, text=f"cannot: {error}", failed=True)
    view = seen(image, loaded.processor.image_processor)
    counts = counts_of(selections)
    text = ", ".join(f"{name} {count}" for name, count in counts.items())
    if "dropped" not in counts:
        text = "all enter the decoder and are pruned there"
    return Tile(image=overlay(view, selections, side=_SIDE, key=False), title=title, text=text)


def _with_legend(sheet: Image.Image) -> Image.Image:
    kinds = dict.fromkeys(("focus", "context", "kept", "merged", "dropped"))
    strip = legend(kinds, sheet.width - 2 * _MARGIN)
    whole = Image.new("RGB", (sheet.width, sheet.height + strip.height), "white")
    whole.paste(sheet, (0, 0))
    whole.paste(strip, (_MARGIN, sheet.height))
    return whole


def _fitted(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image, (_SIDE, _SIDE))


def _one_per_image(dataset: Dataset) -> list[Item]:
    """The first question of each image that asks about something known, or else its first."""
    first: dict[str, Item] = {}
    for item in dataset.items:
        held = first.setdefault(item.group, item)
        if item.subjects and not held.subjects:
            first[item.group] = item
    return list(first.values())
