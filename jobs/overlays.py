"""Pictures of kept tokens: sheets of a few images x every method per model and budget, and the
committed rows of a run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from PIL import Image, ImageOps

from cluster.config import MediaLimits
from cluster.demo.contact_sheet import Tile, draw_contact_sheet
from cluster.errors import RedrawDiffers, RowError, UsageError
from cluster.images import decode_image
from cluster.output.answered_rows import AnsweredRow, answered_rows
from cluster.output.summary import Summary
from sppruner.errors import EvaluationError, SpprunerError
from sppruner.evaluation import Dataset, Item, method_label
from sppruner.models.jpeg_scaling import jpeg_scale_of
from sppruner.models.loading import LoadedModel, load_model
from sppruner.pictures.geometry import visible_crop
from sppruner.pictures.overlay import (
    count_kinds,
    legend,
    overlay,
)
from sppruner.pictures.selections import prepare_image, selections_from_report
from sppruner.pruner import Pruner
from sppruner.spec import PruneSpec

log = structlog.get_logger(__name__)

_IMAGES = 4
_TILE_SIDE = 240  # pixels of a tile on a sheet
_LEGEND_MARGIN = 12
_NAME_CHARACTERS = 50  # characters, of up to 4 bytes each


def make_folder(folder: Path) -> None:
    """Creates the folder of --overlay. Raises EvaluationError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"--overlay {folder}: not a folder to write to ({error})") from error


def write_overlays(
    loaded: LoadedModel, dataset: Dataset, specs: Sequence[PruneSpec], folder: Path
) -> list[Path]:
    """Writes sheets `<model>-<retained>.png`: one row per image, the image and then each method.

    A model name that is too long or not valid as a file name is shortened to its end and followed
    by its hash. A method that the model cannot run gets an empty frame with the reason.
    """
    make_folder(folder)
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    name = _make_sheet_name(loaded.identity.name)
    written = []
    for budget in dict.fromkeys(spec.budget.ratio for spec in specs):
        members = [spec for spec in specs if spec.budget.ratio == budget]
        tiles = []
        for item in _pick_items(dataset)[:_IMAGES]:
            image = visible_crop(item.image(), loaded.processor.image_processor)
            tiles.append(Tile(image=_fit(image), title=item.kind, text=item.prompt))
            tiles += [_make_tile(pruner, loaded, item, spec) for spec in members]
        written.append(folder / f"{name}-{budget}.png")
        _add_legend(draw_contact_sheet(tiles, columns=1 + len(members))).save(written[-1])
    return written


def write_row_overlays(summary: Summary, folder: Path, *, rows: int) -> list[Path]:
    """Writes `<number>-<key>.png` for each of a run's first labelled rows, numbered from 0: the
    kept tokens that the row records. A long key is shortened to its end.

    The run's model encodes the run's images and selects again. Raises RedrawDiffers if a row
    records other tokens than that selection; in half precision only if their number differs,
    otherwise the row is drawn as recorded, without focus and context, and a warning has the number
    of differing tokens. Raises UsageError if model or images are not available.
    """
    try:
        make_folder(folder)
    except EvaluationError as error:
        raise UsageError(str(error)) from error
    labelled = answered_rows(summary.output, rows)
    loaded = _load_run_model(summary)
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    written: list[Path] = []
    for number, row in enumerate(labelled):
        path = folder / f"{number:04}-{_make_file_name(row.key)}.png"
        _draw_row(pruner, loaded.processor, row, summary).save(path)
        written.append(path)
    return written


def _make_file_name(text: str) -> str:
    """A file name within its folder and of limited length; empty if no valid character is left.
    The end of a path says more than its beginning, so the end is kept."""
    return re.sub(r"[^\w.-]+", "-", text)[-_NAME_CHARACTERS:].strip("-.")


def _make_sheet_name(model: str) -> str:
    """A file name unique to the model: its name, or a shortened one with a hash."""
    name = _make_file_name(model)
    return name if name == model else f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _draw_row(pruner: Pruner, processor: Any, row: AnsweredRow, summary: Summary) -> Image.Image:
    if row.spec.is_dense:
        raise UsageError(f"row {row.key!r} was labelled with every token: nothing to draw")
    try:
        # As in the run: runs from before reduced decoding existed decoded all pixels.
        reduction = jpeg_scale_of(processor) if summary.settings.get("reduced_jpegs") else None
        image = decode_image(row.image, MediaLimits(**summary.settings["media"]), reduction)
        prepared = prepare_image(pruner, processor, image, row.prompt, row.spec)
    except (RowError, SpprunerError) as error:
        raise UsageError(f"row {row.key!r}: cannot be selected from again: {error}") from error
    (report,) = prepared.reports
    view = visible_crop(image, processor.image_processor)
    if report.kept_tokens == row.kept_tokens:
        return overlay(view, prepared.selections)
    dtype, device = pruner.model.dtype, pruner.model.device.type
    # Half precision rounds differently in a batch than in a batch of one, which can swap tokens of
    # nearly equal scores, but never changes their number.
    swapped = dtype != torch.float32 and _count_bits(report.kept_tokens) == _count_bits(
        row.kept_tokens
    )
    if not swapped or len(report.kept_tokens) != len(row.kept_tokens):
        raise RedrawDiffers(
            f"row {row.key!r}: selecting again on {device} in {dtype} gives other tokens than the "
            "run committed: draw on the device and with the packages of the run; if it differs "
            "there too, either the row records the wrong tokens, or scores were so close that "
            "encoding in a batch swapped them"
        )
    differing = _count_differences(report.kept_tokens, row.kept_tokens)
    log.warning("overlay_as_told", row=row.key, dtype=str(dtype), tokens_chosen_otherwise=differing)
    return overlay(view, selections_from_report(prepared, row.kept_tokens))


def _count_bits(mask: bytes) -> int:
    return int.from_bytes(mask, "little").bit_count()


def _count_differences(one: bytes, other: bytes) -> int:
    """Number of bits in which two masks of equal length differ."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).bit_count()


def _load_run_model(summary: Summary) -> LoadedModel:
    """The run's model at its revision and precision. Raises UsageError."""
    model, revision = summary.settings["model"], summary.settings["model_revision"]
    try:
        dtype = summary.dtype or "auto"
        loaded = load_model(model, revision=revision, dtype=dtype)
    except SpprunerError as error:
        raise UsageError(f"the run's model is needed to draw its rows: {error}") from error
    backend = summary.settings["image_backend"]
    if loaded.image_backend != backend:
        raise UsageError(
            f"the run read its images with {backend}, this machine reads them with "
            f"{loaded.image_backend}: install torchvision here if the run had it, else remove it"
        )
    return loaded


def _make_tile(pruner: Pruner, loaded: LoadedModel, item: Item, spec: PruneSpec) -> Tile:
    title, image = method_label(spec.method, spec.options), item.image()
    try:
        prepared = prepare_image(pruner, loaded.processor, image, item.prompt, spec)
    except SpprunerError as error:
        return Tile(image=None, title=title, text=f"cannot: {error}", failed=True)
    view = visible_crop(image, loaded.processor.image_processor)
    counts = count_kinds(prepared.selections)
    text = ", ".join(f"{name} {count}" for name, count in counts.items())
    if prepared.stages is not None:
        text += ", more are dropped inside the decoder"
        if "dropped" not in counts:
            text = "all enter the decoder and are pruned there"
    picture = overlay(view, prepared.selections, side=_TILE_SIDE, key=False)
    return Tile(image=picture, title=title, text=text)


def _add_legend(sheet: Image.Image) -> Image.Image:
    kinds = dict.fromkeys(("focus", "context", "kept", "merged", "dropped"))
    strip = legend(kinds, sheet.width - 2 * _LEGEND_MARGIN)
    combined = Image.new("RGB", (sheet.width, sheet.height + strip.height), "white")
    combined.paste(sheet, (0, 0))
    combined.paste(strip, (_LEGEND_MARGIN, sheet.height))
    return combined


def _fit(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image, (_TILE_SIDE, _TILE_SIDE))


def _pick_items(dataset: Dataset) -> list[Item]:
    """Per image the first question with known subjects, otherwise its first question."""
    first: dict[str, Item] = {}
    for item in dataset.items:
        chosen = first.setdefault(item.group, item)
        if item.subjects and not chosen.subjects:
            first[item.group] = item
    return list(first.values())
