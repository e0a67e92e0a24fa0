"""Idefics3 and SmolVLM: which tiles form an image, and prompts that do not determine it."""

from __future__ import annotations

import pytest
import torch

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import Idefics3Adapter
from sppruner.errors import InputError
from tests.sppruner.families.base import left_padded
from tests.sppruner.families.idefics3 import FRAME, GLOBAL, IMAGE, TOKENS, batch, build, image_ids

WORDS = [20, 21, 22]


def tiles_of(rows: list[list[int]]) -> list[tuple[int, int]]:
    """(row, tiles) of each image the adapter finds in prompts of these ids."""
    shapes = Idefics3Adapter(build()).shapes(left_padded(rows))
    return [(row, shape.tiles) for row, shape in shapes]


def test_images_of_a_prompt_are_separated_with_and_without_text_between_them() -> None:
    split, whole = image_ids(3), image_ids(1)
    assert tiles_of([[1, *split, *whole, *WORDS]]) == [(0, 3), (0, 1)]
    assert tiles_of([[1, *split, *WORDS, *split, *WORDS]]) == [(0, 3), (0, 3)]
    assert tiles_of([[1, *whole, *whole, *whole, 20], [1, *WORDS], [1, 20, *split, 21]]) == [
        (0, 1),
        (0, 1),
        (0, 1),
        (2, 3),
    ]


def test_prompts_of_text_only_have_no_images() -> None:
    assert tiles_of([[1, *WORDS], [1, 20]]) == []


def test_prompts_cut_off_inside_an_image_are_refused() -> None:
    with pytest.raises(InputError, match="prompt 0 has 7 places for visual tokens in a row"):
        tiles_of([[1, FRAME, GLOBAL, *[IMAGE] * 7]])
    with pytest.raises(InputError, match="prompt 1 ends inside its last image"):
        tiles_of([[1, *image_ids(1), 20], [1, FRAME, GLOBAL, *[IMAGE] * TOKENS]])


def test_tiles_that_do_not_fit_their_places_are_refused_before_the_encoder_runs() -> None:
    inputs = batch([1, 1])
    inputs["pixel_values"][1, 1] = torch.randn(3, 32, 32)
    with pytest.raises(InputError, match="5 tiles were given, the prompts have places for 4"):
        Idefics3Adapter(build()).encode(inputs, frozenset())


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_text_between_tiles_is_never_pruned(tokens: int) -> None:
    inputs = batch([1, 2])
    spec = PruneSpec(method="grid", budget=Budget(tokens=tokens))
    prepared = Pruner(build()).prepare(inputs, spec)
    for row in range(2):
        before, after = inputs["input_ids"][row], prepared.inputs["input_ids"][row]
        words = before[(before != IMAGE) & inputs["attention_mask"][row].bool()]
        kept = after[(after != IMAGE) & prepared.inputs["attention_mask"][row].bool()]
        assert kept.equal(words)
    assert [report.visual_tokens_kept for report in prepared.reports] == [
        tokens,
        min(tokens, TOKENS) + tokens,
    ]
