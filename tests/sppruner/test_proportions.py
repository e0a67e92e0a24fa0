"""An image of any proportions is processed at a bounded expense, or refused before the work."""

from __future__ import annotations

import tracemalloc
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sppruner.engine import ContinuousEngine, Request
from sppruner.errors import ImageTooNarrow
from sppruner.models.loading import load_processor, resolve_model
from sppruner.prompts import build_inputs
from sppruner.proportions import MAX_RATIO, check_proportions
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder

LLAVA = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


@cache
def processor(family: str) -> Any:
    with TemporaryDirectory() as folder:
        return load_processor(resolve_model(str(write_folder(family, Path(folder)))))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(sides=st.tuples(st.integers(1, 6), st.integers(1, 3000)), upright=st.booleans())
def test_any_proportions_are_processed_within_bounds_or_refused(
    family: str, sides: tuple[int, int], upright: bool
) -> None:
    image = Image.new("RGB", sides if upright else sides[::-1])
    short, long = sorted(sides)
    tracemalloc.start()
    try:
        build_inputs(processor(family), ["what ?"], [image])
        assert long <= MAX_RATIO * short
    except ImageTooNarrow:
        assert long > MAX_RATIO * short
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 40 * 2**20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, MAX_RATIO), (MAX_RATIO, 1)])
def test_the_narrowest_image_that_is_not_refused_is_processed(
    family: str, size: tuple[int, int]
) -> None:
    build_inputs(processor(family), ["what ?"], [Image.new("RGB", size)])


def test_a_large_fixed_edge_lowers_the_limit() -> None:
    """LLaVA-1.5 takes 200 : 1 as 336 x 67,200; a processor for 672 pixels would take four times
    as many."""
    strip = Image.new("RGB", (1, MAX_RATIO))
    check_proportions(LLAVA, [strip])
    large = CLIPImageProcessorPil(size={"shortest_edge": 672})
    with pytest.raises(ImageTooNarrow, match=r"200 times as long as narrow.*edge to 672"):
        check_proportions(large, [strip])
    check_proportions(CLIPImageProcessorPil(size={"height": 672, "width": 672}), [strip])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_strip_fails_alone_and_says_its_proportions(family: str, tmp_path: Path) -> None:
    engine = ContinuousEngine(str(write_folder(family, tmp_path)), device="cpu", slots=2)
    images = [Image.new("RGB", size) for size in ((1, 2000), (40, 30))]
    strip, other = engine.run(
        [Request(id=str(n), prompt="what ?", images=(image,)) for n, image in enumerate(images)]
    )
    engine.close()
    assert (strip.error_code, strip.error_stage) == ("image_too_large", "decode")
    assert "1 x 2000 pixels: 2000 times" in str(strip.error_message)
    assert other.error_code is None
