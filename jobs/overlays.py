"""Pictures of what methods keep: a few images × every method, one sheet per model and budget, or
what the model saw of a run's committed rows.
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
from cluster.demo.contact_sheet import Tile, contact_sheet
from cluster.errors import RedrawDiffers, RowError, UsageError
from cluster.images import decode_image
from cluster.output.answered_rows import AnsweredRow, answered_rows
from cluster.output.summary import Summary
from sppruner.errors import SpprunerError
from sppruner.evaluation import Dataset, Item, method_label
from sppruner.models.jpeg_scaling import jpeg_scale_of
from sppruner.models.loading import LoadedModel, load_model
from sppruner.pictures.geometry import visible_crop
from sppruner.pictures.overlay import (
    count_kinds,
    legend,
    overlay,
    prepare_image,
    selections_from_report,
)
from sppruner.pruner import Pruner
from sppruner.spec import PruneSpec

log = structlog.get_logger(__name__)

_IMAGES = 4
_SIDE = 240  # of a tile on the sheet
_MARGIN = 12
_NAME = 50  # characters, of up to 4 bytes each


def write_overlays(
    loaded: LoadedModel, dataset: Dataset, specs: Sequence[PruneSpec], folder: Path
) -> list[Path]:
    """Sheets `<model>-<retained>.png`: a row per image, the image itself and then each method.

    A model's name that is too long or not fit for a file is cut to its end and followed by a hash
    of it. A method that the model cannot run leaves an empty frame with the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    name = _sheet_name(loaded.identity.name)
    written = []
    for budget in dict.fromkeys(spec.budget.ratio for spec in specs):
        members = [spec for spec in specs if spec.budget.ratio == budget]
        tiles = []
        for item in _one_per_image(dataset)[:_IMAGES]:
            image = visible_crop(item.image(), loaded.processor.image_processor)
            tiles.append(Tile(image=_fitted(image), title=item.kind, text=item.prompt))
            tiles += [_tile(pruner, loaded, item, spec) for spec in members]
        written.append(folder / f"{name}-{budget}.png")
        _with_legend(contact_sheet(tiles, columns=1 + len(members))).save(written[-1])
    return written


def write_seen(summary: Summary, folder: Path, *, rows: int) -> list[Path]:
    """`<number>-<key>.png` of each of a run's first labelled rows, counted from 0: the tokens it
    says the model saw. Of a long key the end is in the name.

    Rows are encoded and selected from once more, by the run's model on the run's images. Where a
    row says other tokens than that chose, RedrawDiffers is raised; in half precision only where
    they are not as many, else the row is drawn as it says, without focus and context, and a
    warning counts the tokens. Raises UsageError where model or images are not to be had.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--overlay {folder}: not a folder to write to ({error})") from error
    labelled = answered_rows(summary.output, rows)
    loaded = _model_of(summary)
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    written: list[Path] = []
    for number, row in enumerate(labelled):
        path = folder / f"{number:04}-{_file_name(row.key)}.png"
        _picture(pruner, loaded.processor, row, summary).save(path)
        written.append(path)
    return written


def _file_name(text: str) -> str:
    """One that does not leave its folder and is not too long; empty where nothing of it is left.
    Of a path the end tells more than the beginning."""
    return re.sub(r"[^\w.-]+", "-", text)[-_NAME:].strip("-.")


def _sheet_name(model: str) -> str:
    """A file name that no other model has: by a hash, where the name itself cannot be it."""
    name = _file_name(model)
    return name if name == model else f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _picture(pruner: Pruner, processor: Any, row: AnsweredRow, summary: Summary) -> Image.Image:
    if row.spec.is_dense:
        raise UsageError(f"row {row.key!r} was labelled with every token: nothing to draw")
    try:
        # As the run decoded: one that was begun before reductions existed read all pixels.
        jpeg_scale = jpeg_scale_of(processor) if summary.settings.get("reduced_jpegs") else None
        image = decode_image(row.image, MediaLimits(**summary.settings["media"]), jpeg_scale)
        prepared = prepare_image(pruner, processor, image, row.prompt, row.spec)
    except (RowError, SpprunerError) as error:
        raise UsageError(f"row {row.key!r}: cannot be selected from again: {error}") from error
    (report,) = prepared.reports
    view = visible_crop(image, processor.image_processor)
    if report.kept_tokens == row.kept_tokens:
        return overlay(view, prepared.selections)
    dtype, device = pruner.model.dtype, pruner.model.device.type
    # Half precision rounds otherwise in a batch than alone, and tips what scored alike: other
    # tokens are chosen then, never more or fewer.
    tipped = dtype != torch.float32 and _count(report.kept_tokens) == _count(row.kept_tokens)
    if not tipped or len(report.kept_tokens) != len(row.kept_tokens):
        raise RedrawDiffers(
            f"row {row.key!r}: selecting again on {device} in {dtype} gives other tokens than the "
            "run committed: draw on the device and with the packages of the run; where it differs "
            "there too, either the row is wrong about what the model saw, or scores were so close "
            "that encoding in a batch tipped them"
        )
    differ = _differ(report.kept_tokens, row.kept_tokens)
    log.warning("overlay_as_told", row=row.key, dtype=str(dtype), tokens_chosen_otherwise=differ)
    return overlay(view, selections_from_report(prepared, row.kept_tokens))


def _count(mask: bytes) -> int:
    return int.from_bytes(mask, "little").bit_count()


def _differ(one: bytes, other: bytes) -> int:
    """Bits that two masks of as many bytes do not share."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).bit_count()


def _model_of(summary: Summary) -> LoadedModel:
    """The run's model as it was. Raises UsageError."""
    model, revision = summary.settings["model"], summary.settings["model_revision"]
    try:
        dtype = summary.settings.get("dtype", "auto")
        loaded = load_model(model, revision=revision, dtype=dtype)
    except SpprunerError as error:
        raise UsageError(f"the run's model is needed to draw its rows: {error}") from error
    backend = summary.settings["image_backend"]
    if loaded.image_backend != backend:
        raise UsageError(
            f"the run read its images with {backend}, this machine does with "
            f"{loaded.image_backend}: install torchvision here if the run had it, else remove it"
        )
    return loaded


def _tile(pruner: Pruner, loaded: LoadedModel, item: Item, spec: PruneSpec) -> Tile:
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
    picture = overlay(view, prepared.selections, side=_SIDE, key=False)
    return Tile(image=picture, title=title, text=text)


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
