"""The report's mask marks exactly the tokens that the packed prompt holds, in prompt order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sppruner.pruner
import sppruner.reports
from sppruner import Budget, Prepared, Pruner, PruneReport, PruneSpec
from sppruner.errors import PruningHadNoEffect
from sppruner.spec import DENSE
from tests.sppruner.families import FAMILIES

# Text relevance needs a tokenizer. `pool` and `sppruner` replace several tokens by one.
METHODS = ["grid", "random:seed=3", "pool", "sppruner:relevance=none"]


def bits(report: PruneReport) -> list[int]:
    """Indices of the tokens that the mask marks."""
    packed = np.frombuffer(report.kept_tokens, np.uint8)
    assert len(packed) == -(-report.visual_tokens // 8)
    unpacked = np.unpackbits(packed, bitorder="little")
    assert not unpacked[report.visual_tokens :].any(), "bits beyond the last token"
    return unpacked.nonzero()[0].tolist()


def chosen(prepared: Prepared, row: int) -> list[int]:
    """Indices of the tokens that the pruner kept of a prompt's images, image after image."""
    indices, start = [], 0
    for image, kept in zip(prepared.images, prepared.kept, strict=True):
        if image.row == row:
            indices += [start + index for index in kept.index_K.tolist()]
            start += image.count
    return indices


def packed(
    pruner: Pruner, inputs: dict[str, torch.Tensor], prepared: Prepared, row: int
) -> list[int]:
    """Which of a prompt's visual tokens the packed prompt holds, by their position ids only."""

    def places(of: Any, positions_RBS: torch.Tensor) -> list[tuple[int, ...]]:
        visual_S = pruner.adapter.placeholders(of["input_ids"])[row] & (
            of["attention_mask"][row] > 0
        )
        # With M-RoPE the first row renumbers text; the three others locate a token.
        rows = slice(1, None) if len(positions_RBS) > 1 else slice(None)
        return [tuple(place) for place in positions_RBS[rows, row][:, visual_S].T.tolist()]

    positions = prepared.inputs["position_ids"]
    held = places(prepared.inputs, positions if positions.dim() == 3 else positions[None])
    all_of_them = places(inputs, pruner.adapter.positions(inputs))
    assert len(set(all_of_them)) == len(all_of_them)
    return [index for index, place in enumerate(all_of_them) if place in set(held)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_marks_the_tokens_that_enter_the_decoder(family: str) -> None:
    pruner = Pruner(FAMILIES[family].build())
    staged = f"fastv:layer={pruner.adapter.capabilities.first_prunable_layer}"
    third, five = Budget(ratio=0.3), Budget(tokens=5)
    prompts = [(PruneSpec.parse(method, third), 2) for method in (*METHODS, staged)]
    prompts += [(PruneSpec.parse(method, five), 1) for method in METHODS]
    nothing = PruneSpec(method="grid", budget=Budget(tokens=0))
    prompts += [(nothing, 1), (nothing, 0), (DENSE, 2), (DENSE, 0)]
    inputs = FAMILIES[family].batch([images for _, images in prompts])
    prepared = pruner.prepare(inputs, [spec for spec, _ in prompts])
    for row, ((spec, images), report) in enumerate(zip(prompts, prepared.reports, strict=True)):
        assert bits(report) == chosen(prepared, row) == packed(pruner, inputs, prepared, row)
        whole = spec.is_dense or spec.method == "fastv"
        due = report.visual_tokens if whole else report.visual_tokens_kept
        assert len(bits(report)) == due
        assert (due > 0) == (images > 0 and spec != nothing)


def test_an_unchanged_batch_has_every_bit_set() -> None:
    """Neither the dense control nor a batch without images is re-packed."""
    family = FAMILIES["llava_next"]
    pruner = Pruner(family.build())
    dense = pruner.generate(family.batch([2, 0, 1]), DENSE, max_new_tokens=1, do_sample=False)
    grid = PruneSpec(method="grid", budget=Budget(ratio=0.3))
    text = pruner.prepare(family.batch([0]), grid)
    for report in (*dense.reports, *text.reports):
        assert bits(report) == list(range(report.visual_tokens))


def test_tokens_dropped_inside_the_decoder_count_as_entering_it() -> None:
    family = FAMILIES["llava"]
    spec = PruneSpec.parse("sppruner:relevance=none:mode=pre+mid", Budget(tokens=6))
    (report,) = Pruner(family.build()).prepare(family.batch([1]), spec).reports
    assert report.visual_tokens_kept == 6
    assert len(bits(report)) == report.layer_tokens[0] - (report.prompt_tokens_dense - 16) > 6


@pytest.mark.parametrize("off", [-1, 1])
def test_a_mask_with_a_wrong_number_of_tokens_raises(
    off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt itself is packed correctly: only the report would be wrong."""
    family = FAMILIES["llava"]
    pruner = Pruner(family.build())
    prove: Callable[..., list[PruneReport]] = sppruner.reports.pruned_reports

    def with_a_wrong_mask(adapter: Any, specs: Any, inputs: Any, **given: Any) -> Any:
        keep_BS = given["keep_BS"].clone()
        visual_BS = adapter.placeholders(inputs["input_ids"])
        row, place = (visual_BS & (keep_BS == (off < 0))).nonzero()[0]
        keep_BS[row, place] = off > 0
        return prove(adapter, specs, inputs, **(given | {"keep_BS": keep_BS}))

    monkeypatch.setattr(sppruner.pruner, "pruned_reports", with_a_wrong_mask)
    with pytest.raises(PruningHadNoEffect, match=f"leave 6 of 16 .* the mask {6 + off},"):
        pruner.prepare(family.batch([1]), PruneSpec(method="grid", budget=Budget(tokens=6)))
