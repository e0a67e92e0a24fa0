"""Prompts that are processed one by one and collated equal the processor's own batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from sppruner.engine.collate import collate
from sppruner.models.loading import load_processor, resolve_model
from sppruner.prompts import build_inputs
from tests.sppruner.engine.requests import drawn
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.base import PAD
from tests.sppruner.families.folders import write_folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [[1, 2, 1], [0, 0]])
def test_a_collated_batch_is_the_processors_own(
    family: str, images: list[int], tmp_path: Path
) -> None:
    processor = load_processor(resolve_model(str(write_folder(family, tmp_path))))
    rng = random.Random(5)
    image_lists = [[drawn(rng) for _ in range(count)] for count in images]
    prompts = ["what is it? " * (1 + n) for n in range(len(images))]
    together = build_inputs(processor, prompts, image_lists)
    single = [
        dict(build_inputs(processor, [prompt], [one]))
        for prompt, one in zip(prompts, image_lists, strict=True)
    ]
    batch = collate(single, PAD)
    assert batch.keys() == together.keys()
    for name, value in together.items():
        assert torch.equal(batch[name], value), name
