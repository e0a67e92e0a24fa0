"""Every method on every family: exact counts, raster order, deterministic selections that do not
depend on the batch. `pytest tests/sppruner/laws/test_methods.py --matrix FILE` writes the matrix.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import pytest
import torch

from sppruner import Budget, Pruner, PruneSpec, available
from sppruner.pruner import Prepared
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.rows import one_row

TEXTS = ["where is the red cross", "count stars", "is there a blue circle left of the sign"]
# The decoders under test have three or four layers: an early stage, or there is nothing to prune.
OPTIONS: dict[str, dict[str, Any]] = {"pyramiddrop": {"layers": "2"}}


def words(text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
    """A tokenizer: a fixed id for each word."""
    return {"input_ids": [8 + zlib.crc32(word.encode()) % 56 for word in text.split()]}


@functools.cache
def pruner_of(name: str) -> Pruner:
    return Pruner(FAMILIES[name].build(), tokenizer=words)


def choices(prepared: Prepared, row: int) -> list[list[int]]:
    return [s.index_K.tolist() for tokens, s in prepared.selections if tokens.row == row]


@pytest.mark.matrix
@pytest.mark.parametrize("check", [name for name in available() if name != "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_method_runs_on_the_family(family: str, check: str) -> None:
    pruner = pruner_of(family)
    inputs = FAMILIES[family].batch([1, 2, 1])
    shapes = pruner.adapter.shapes(inputs)
    for budget in (Budget(ratio=0.333), Budget(ratio=0.111), Budget(tokens=3)):
        spec = PruneSpec(method=check, budget=budget, options=OPTIONS.get(check, {}))
        prepared = pruner.prepare(inputs, spec, TEXTS)

        for row, report in enumerate(prepared.reports):
            sizes = [shape.tokens for at, shape in shapes if at == row]
            assert report.visual_tokens == sum(sizes)
            assert report.visual_tokens_kept == sum(budget.per_image(sizes)), "exact counts"

        for tokens, selection in prepared.selections:
            index = selection.index_K.tolist()
            assert index == sorted(set(index)), "raster order"
            assert all(0 <= i < tokens.count for i in index)
            if selection.replace_KD is not None:
                assert selection.replace_KD.shape == (len(index), tokens.features_ND.shape[1])
                assert torch.isfinite(selection.replace_KD).all()

        again = pruner.prepare(inputs, spec, TEXTS)
        for row, text in enumerate(TEXTS):
            assert choices(again, row) == choices(prepared, row), "deterministic"
            single = pruner.prepare(one_row(pruner.adapter, inputs, row), spec, [text])
            assert choices(single, 0) == choices(prepared, row), "independent of the batch"
