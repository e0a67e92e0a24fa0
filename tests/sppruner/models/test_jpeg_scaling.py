"""A JPEG is never decoded so small that the model loses detail, or that its tiles or token counts
change."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sppruner.models import JpegScale
from sppruner.models.jpeg_scaling import jpeg_scale_of
from sppruner.models.loading import load_processor, resolve_model
from sppruner.prompts import build_inputs
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder

SCALED = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SIDE = st.one_of(st.integers(1, 400), st.integers(1, 50).map(lambda side: 8 * side))

# As the published models have them.
SQUARE = {"height": 336, "width": 336}
LLAVA = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE)
LLAVA_NEXT = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE)
QWEN = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 640 * 28 * 28})


@cache
def processor(family: str) -> Any:
    with TemporaryDirectory() as folder:
        return load_processor(resolve_model(str(write_folder(family, Path(folder)))))


def scale_of(images: Any) -> JpegScale:
    return jpeg_scale_of(SimpleNamespace(image_processor=images))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
@settings(max_examples=40, deadline=None)
@given(width=SIDE, height=SIDE)
def test_scaling_changes_neither_prompt_nor_grid_nor_tiles(
    family: str, width: int, height: int
) -> None:
    factor = jpeg_scale_of(processor(family))(width, height)
    if factor == 1:
        return
    assert width % factor == height % factor == 0
    full, scaled = (
        build_inputs(processor(family), ["what ?"], [Image.new("RGB", size)])
        for size in ((width, height), (width // factor, height // factor))
    )
    assert full["input_ids"].tolist() == scaled["input_ids"].tolist()
    assert full["pixel_values"].shape == scaled["pixel_values"].shape
    if "image_grid_thw" in full:
        assert full["image_grid_thw"].tolist() == scaled["image_grid_thw"].tolist()


@pytest.mark.parametrize("family", SCALED)
def test_a_photograph_is_scaled_as_far_as_its_sides_divide(family: str) -> None:
    jpeg_scale = jpeg_scale_of(processor(family))
    assert [jpeg_scale(width, 3000) for width in (4000, 4004, 4002, 4001)] == [8, 4, 2, 1]
    assert [jpeg_scale(4000, height) for height in (3000, 3004, 3002, 3001)] == [8, 4, 2, 1]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SCALED)))
def test_families_with_other_tilings_are_not_scaled(family: str) -> None:
    jpeg_scale = jpeg_scale_of(processor(family))
    assert {jpeg_scale(side, side) for side in (64, 4000, 8000)} == {1}


@pytest.mark.parametrize(
    ("images", "sizes"),
    [
        # The shorter side is shrunk to 336.
        (LLAVA, {(1344, 1344): 2, (1344, 1342): 1, (2688, 4000): 4, (2686, 4000): 2}),
        # A canvas of 672 × 672 or 1008 × 336, and the whole in a tile of 336 × 336.
        (LLAVA_NEXT, {(2688, 2016): 2, (2016, 2688): 2, (2686, 2016): 1, (5376, 4032): 4}),
        (LLAVA_NEXT, {(4032, 1344): 2, (4032, 1342): 1, (1344, 4032): 2, (4040, 40): 1}),
        # 25 × 25 tokens of 28 × 28 pixels.
        (QWEN, {(2800, 2800): 2, (2798, 2798): 1, (5600, 5600): 4}),
    ],
)
def test_a_scaled_image_has_twice_the_models_input_size(
    images: Any, sizes: dict[tuple[int, int], int]
) -> None:
    assert {size: scale_of(images)(*size) for size in sizes} == sizes


def test_an_image_that_the_model_reads_in_full_size_is_not_scaled() -> None:
    """12.8 megapixels, as the published Qwen2-VL and Qwen2.5-VL have it."""
    full_size = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 16384 * 28**2}
    )
    assert scale_of(full_size)(4000, 3000) == 1
    assert scale_of(CLIPImageProcessorPil(size=SQUARE, do_resize=False))(4000, 3000) == 1


@pytest.mark.parametrize("images", [LLAVA, LLAVA_NEXT, QWEN])
@given(width=st.integers(1, 70_000), height=st.integers(1, 70_000))
def test_every_size_has_a_scale(images: Any, width: int, height: int) -> None:
    """Even sizes that the processor refuses later, such as a line of pixels."""
    assert scale_of(images)(width, height) in (1, 2, 4, 8)
    assert scale_of(images)(1, height) == scale_of(images)(width, 1) == 1


@pytest.mark.parametrize(
    "images",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 336, "longest_edge": 672}),
        LlavaNextImageProcessorPil(size=SQUARE, crop_size=SQUARE),
    ],
)
def test_an_unknown_form_of_size_setting_is_not_scaled(images: Any) -> None:
    assert scale_of(images)(8000, 6000) == 1
