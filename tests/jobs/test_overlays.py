"""Sheets of kept tokens: one per model and budget, with captions that count dropped tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster.demo.contact_sheet import Tile, draw_contact_sheet
from jobs import overlays
from sppruner import Budget, PruneSpec
from sppruner.evaluation import Dataset, drawn_scenes
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model

LONG = "/models/" + "trained-on-questions/" * 5


@functools.cache
def embedded() -> LoadedModel:
    return load_model(EMBEDDED)


@functools.cache
def one_scene() -> Dataset:
    return replace(scenes := drawn_scenes(1), items=scenes.items[:1])


def sheets(folder: Path, model: str, methods: Sequence[str], ratio: float) -> list[Path]:
    """The sheets of a model with this name."""
    loaded = replace(embedded(), identity=replace(embedded().identity, name=model))
    specs = [PruneSpec.parse(method, Budget(ratio=ratio)) for method in methods]
    return overlays.write_overlays(loaded, one_scene(), specs, folder)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{LONG}step-100", f"{LONG}step-200"),
        (f"/a/{LONG}step-100", f"/b/{LONG}step-100"),
        ("org/model", "org-model"),
        ("../model", "model"),
        (
            "\U00020000" * 60,
            "\U00020000" * 59,
        ),  # four bytes per character: the longest possible name
    ],
    ids=["end", "beginning", "slash", "dots", "bytes"],
)
def test_no_model_overwrites_the_sheets_of_another(one: str, other: str, tmp_path: Path) -> None:
    for model in (one, other):
        sheets(tmp_path, model, ["grid"], 1 / 3)
    assert len(list(tmp_path.iterdir())) == 2


def test_sheet_names_keep_the_end_of_a_model_name(tmp_path: Path) -> None:
    (short,) = sheets(tmp_path, "tiny-llava", ["grid"], 0.5)
    assert short.name == "tiny-llava-0.5.png"
    (long,) = sheets(tmp_path, f"{LONG}step-100", ["grid"], 0.5)
    assert "questions-step-100-" in long.name


@pytest.mark.parametrize(
    ("method", "ratio", "says"),
    [
        ("grid", 0.25, "kept 36, dropped 108"),
        ("grid", 1.0, "kept 144"),
        ("fastv:layer=1", 0.25, "all enter the decoder and are pruned there"),
        ("fastv:layer=1", 1.0, "kept 144"),
        ("sppruner:mode=pre+mid:kappa=0", 0.25, "dropped 90, more are dropped inside the decoder"),
        ("sppruner:mode=pre+mid:kappa=0", 0.75, "all enter the decoder and are pruned there"),
    ],
)
def test_a_caption_says_how_many_tokens_are_dropped_before_and_inside_the_decoder(
    method: str, ratio: float, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tile] = []

    def record(tiles: Sequence[Tile], **options: Any) -> Image.Image:
        drawn.extend(tiles)
        return draw_contact_sheet(tiles, **options)

    monkeypatch.setattr(overlays, "draw_contact_sheet", record)
    sheets(tmp_path, EMBEDDED, [method], ratio)
    _, tile = drawn
    assert tile.text.endswith(says)
    assert ("inside" in tile.text) == ("inside" in says)
