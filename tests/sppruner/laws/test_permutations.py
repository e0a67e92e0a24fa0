"""The tokens that an image keeps depend neither on its place in a prompt nor on other images."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from sppruner import Budget, PruneSpec
from sppruner.adapters import Kept
from tests.sppruner.families import FAMILIES, pruner_of
from tests.sppruner.families.base import left_padded
from tests.sppruner.families.rows import one_row

IMAGES = 4
# One for each kind of signal, and one that merges; none needs text.
OPTIONS: dict[str, dict[str, Any]] = {
    "random": {"seed": 3},
    "sppruner": {"relevance": "none"},
    "topk": {},
    "visionzip": {},
}
PER_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids"}


@functools.cache
def inputs_of(family: str) -> dict[str, Tensor]:
    """One image a prompt."""
    return FAMILIES[family].batch([1] * IMAGES)


@functools.cache
def kept_in_single_prompts(family: str, method: str) -> list[Kept]:
    return pruner_of(family).prepare(inputs_of(family), spec_of(method)).kept


def spec_of(method: str) -> PruneSpec:
    return PruneSpec(method=method, budget=Budget(ratio=0.4), options=OPTIONS[method])


def dealt(family: str, order: Sequence[int], sizes: Sequence[int]) -> dict[str, Tensor]:
    """The prompts of `inputs_of` in another order, joined to prompts of `sizes` images."""
    adapter, inputs = pruner_of(family).adapter, inputs_of(family)
    single = iter([one_row(adapter, inputs, image) for image in order])
    prompts = [[next(single) for _ in range(size)] for size in sizes]
    batch = left_padded([[t for one in prompt for t in words(one)] for prompt in prompts])
    if "mm_token_type_ids" in inputs:
        batch["mm_token_type_ids"] = (batch["input_ids"] == FAMILIES[family].image_id).int()
    for name in inputs.keys() - PER_TOKEN:
        values = [[one[name] for one in prompt] for prompt in prompts]
        if "pixel_attention_mask" in inputs:  # tiles stacked by prompt, filled up with zeros
            rows = [torch.cat(prompt, dim=1) for prompt in values]
            most = max(row.shape[1] for row in rows)
            after = [0, 0] * (rows[0].dim() - 2)
            batch[name] = torch.cat([pad(row, (*after, 0, most - row.shape[1])) for row in rows])
        else:
            batch[name] = torch.cat([value for prompt in values for value in prompt])
    return batch


def words(one: Mapping[str, Tensor]) -> list[int]:
    """The ids of a prompt without its padding."""
    return one["input_ids"][0][one["attention_mask"][0].bool()].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(IMAGES)),
    sizes=st.sampled_from([[4], [3, 1], [1, 3], [2, 2], [1, 1, 2], [1, 1, 1, 1]]),
    method=st.sampled_from(sorted(OPTIONS)),
)
def test_an_image_keeps_the_same_tokens_at_any_place_of_a_batch(
    family: str, order: list[int], sizes: list[int], method: str
) -> None:
    prepared = pruner_of(family).prepare(dealt(family, order, sizes), spec_of(method))
    single = kept_in_single_prompts(family, method)
    assert [report.visual_tokens_kept for report in prepared.reports] == [
        sum(len(single[image].index_K) for image in images) for images in cut(order, sizes)
    ]
    for image, kept in zip(order, prepared.kept, strict=True):
        assert kept.index_K.equal(single[image].index_K), f"image {image}"
        torch.testing.assert_close(
            kept.features_KD, single[image].features_KD, atol=1e-4, rtol=1e-4
        )


def cut(order: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    images = iter(order)
    return [[next(images) for _ in range(size)] for size in sizes]
