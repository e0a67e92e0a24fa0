"""The picture shows the kept tokens by kind, and fades the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sppruner.adapters.base import raster
from sppruner.errors import InputError
from sppruner.evaluation import drawn_scenes
from sppruner.models.loading import EMBEDDED, load_model
from sppruner.pictures.overlay import (
    count_kinds,
    legend,
    overlay,
)
from sppruner.pictures.selections import prepare_image
from sppruner.pruner import Pruner
from sppruner.spec import Budget, PruneSpec
from sppruner.types import Selection, VisualTokens

RED = (255, 0, 0)
FOCUS, CONTEXT, MERGED = (213, 94, 0), (86, 180, 233), (0, 158, 115)
Pair = tuple[VisualTokens, Selection]


def pair(kept: list[int], *, focus: list[bool] | None = None, merged: list[int] = []) -> Pair:  # noqa: B006
    """A plane of 4 × 4 tokens; `merged` lists the kept tokens with new features."""
    features_ND = torch.zeros(16, 2)
    replace_KD = torch.zeros(len(kept), 2)
    replace_KD[merged] = 1.0
    tokens = VisualTokens(
        features_ND=features_ND,
        hidden_NV=None,
        coords_N2=raster(4, 4, torch.device("cpu")),
        signals={},
    )
    selection = Selection(
        index_K=torch.tensor(kept, dtype=torch.int64),
        replace_KD=replace_KD if merged else None,
        focus_K=None if focus is None else torch.tensor(focus),
    )
    return tokens, selection


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def is_colour(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (pixels(picture) == colour).all(axis=2)


def red() -> Image.Image:
    return Image.new("RGB", (64, 64), RED)


def test_kept_patches_are_unchanged_and_dropped_patches_are_grey() -> None:
    picture = overlay(red(), [pair([5])], side=400, key=False)
    kept = is_colour(picture, RED)
    assert kept[110:190, 110:190].all()
    outside = pixels(picture)[:95, :95]
    assert (outside == outside[..., :1]).all(), "dropped patches are grey"


def test_focus_context_and_merged_tokens_have_distinct_marks() -> None:
    picture = overlay(red(), [pair([0, 15], focus=[True, False], merged=[1])], side=400, key=False)
    assert is_colour(picture, FOCUS)[:100, :100].any()
    assert not is_colour(picture, FOCUS)[100:, 100:].any()
    assert is_colour(picture, CONTEXT)[300:, 300:].any()
    rows, columns = is_colour(picture, MERGED).nonzero()
    assert rows.min() >= 300
    assert columns.min() >= 300


def test_no_line_separates_neighbours_of_one_kind() -> None:
    picture = overlay(red(), [pair([5, 6], focus=[True, True])], side=400, key=False)
    assert is_colour(picture, RED)[150, 110:290].all()


def test_counts_include_every_kind_that_occurs() -> None:
    both = [pair([0, 1, 15], focus=[True, False, False], merged=[1])]
    assert count_kinds(both) == {"focus": 1, "context": 2, "merged": 1, "dropped": 13}
    assert count_kinds([pair(list(range(16)))]) == {"kept": 16}


def test_views_are_side_by_side_and_tiles_share_a_panel() -> None:
    one = overlay(red(), [pair([0])], side=200, key=False)
    two = overlay(red(), [pair([0])] * 2, side=200, key=False)
    tiled = overlay(red(), [pair([0])] * 5, side=200, key=False)
    assert one.size == (200, 200)
    assert two.width == tiled.width > 400
    # Four tiles in two rows: the first token of each is a sixty-fourth of the panel.
    kept = is_colour(tiled, RED)[:, :200]
    for top in (0, 100):
        for left in (0, 100):
            assert kept[top + 8 : top + 17, left + 8 : left + 17].all()


def test_the_legend_wraps_instead_of_being_cut() -> None:
    kinds = {"focus": 100, "context": 100, "merged": 100, "dropped": 100}
    assert legend(kinds, 120).height > legend(kinds, 600).height
    plain, keyed = (overlay(red(), [pair([0])], side=200, key=key) for key in (False, True))
    assert keyed.height > plain.height


def test_no_selection_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to draw"):
        overlay(red(), [])


def test_a_selection_of_the_embedded_model_is_drawn() -> None:
    loaded = load_model(EMBEDDED)
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    item = drawn_scenes(1).items[0]
    spec = PruneSpec(method="sppruner", budget=Budget(ratio=0.25))
    image = item.image()
    selections = prepare_image(pruner, loaded.processor, image, item.prompt, spec).selections
    counts = count_kinds(selections)
    assert counts["focus"] + counts["context"] == 36
    assert counts["dropped"] == 144 - 36
    picture = overlay(image, selections, side=240)
    assert is_colour(picture, FOCUS).any()
    assert is_colour(picture, CONTEXT).any()
