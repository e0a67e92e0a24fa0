"""Batches of the families' real image processors, for odd sizes: shapes, counts and placeholders
agree, and the pruned prompt meets its budget."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    SmolVLMProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from sppruner import Budget, Pruner, PruneSpec
from sppruner.adapters import adapter_for
from tests.sppruner.families import FAMILIES, llava_next, llava_onevision

EDGE = {"longest_edge": 32}
RANDOM = np.random.default_rng(0)
TALL, WIDE, TINY, SQUARE, SLIM = (70, 20), (25, 90), (3, 4), (40, 40), (9, 64)
# Images per prompt; the empty one is text only. Two images of a prompt touch, as adjacent
# placeholders do.
ROWS = [[TALL], [WIDE, TINY], [], [SQUARE, SLIM, SQUARE]]
GRID = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<video>", "<image>", "<img>", "</img>"]
FRAMES = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]


def tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """Words and special tokens; "<image>" is 5, the families' placeholder."""
    words = [*SPECIAL, *special, "what", "is", "this"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    core.add_special_tokens([AddedToken(word, special=True) for word in [*SPECIAL, *special]])
    core.add_tokens([AddedToken("\n", normalized=False)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


def llava_next_processor() -> Any:
    tile = {"height": llava_next.TILE, "width": llava_next.TILE}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": llava_next.TILE},
        crop_size=tile,
        image_grid_pinpoints=llava_next.PINPOINTS,
    )
    return LlavaNextProcessor(
        images,
        tokenizer([]),
        patch_size=llava_next.TILE // llava_next.SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_onevision_processor() -> Any:
    images = LlavaOnevisionImageProcessorPil(
        size={"height": llava_onevision.TILE, "width": llava_onevision.TILE},
        image_grid_pinpoints=llava_onevision.PINPOINTS,
    )
    return LlavaOnevisionProcessor(
        images,
        tokenizer([]),
        None,
        num_image_tokens=llava_onevision.SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )


def internvl_processor() -> Any:
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6
    )
    words = tokenizer([])
    for name, token in (
        ("start_image", "<img>"),
        ("end_image", "</img>"),
        ("context_image", "<image>"),
        ("video", "<video>"),
    ):
        setattr(words, f"{name}_token", token)
        setattr(words, f"{name}_token_id", words.convert_tokens_to_ids(token))
    return InternVLProcessor(images, words, None, image_seq_length=16)


def idefics3_processor() -> Any:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size=EDGE)
    return Idefics3Processor(images, tokenizer([*FRAMES, *GRID]), image_seq_len=16)


def smolvlm_processor() -> Any:
    images = SmolVLMImageProcessorPil(size={"longest_edge": 96}, max_image_size=EDGE)
    return SmolVLMProcessor(images, tokenizer([*FRAMES, *GRID]), None, image_seq_len=16)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava_next": llava_next_processor,
    "llava_onevision": llava_onevision_processor,
    "internvl": internvl_processor,
    "idefics3": idefics3_processor,
    "smolvlm": smolvlm_processor,
}


@pytest.fixture(params=PROCESSORS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def picture(size: tuple[int, int]) -> Image.Image:
    """Noise of (height, width), different for every call."""
    return Image.fromarray(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8))


def processed(family: str, rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """What the family's processor makes of prompts with images of these sizes."""
    made = PROCESSORS[family]()(
        images=[[picture(size) for size in row] for row in rows],
        text=["<image>" * len(row) + " what is this" for row in rows],
        padding=True,
        return_tensors="pt",
    )
    return {name: value for name, value in made.items() if name != "token_type_ids"}


@pytest.fixture(autouse=True)
def no_video(monkeypatch: pytest.MonkeyPatch) -> None:
    # Video processors need torchvision, spoken times num2words: no part of images.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    monkeypatch.setattr(processing_smolvlm, "num2words", object())


@pytest.fixture
def inputs(family: str, no_video: None) -> dict[str, Tensor]:
    return processed(family, ROWS)


def test_an_image_has_as_many_placeholders_as_in_a_prompt_of_its_own(
    family: str, inputs: dict[str, Tensor]
) -> None:
    adapter = adapter_for(FAMILIES[family].build())
    shapes = adapter.shapes(inputs)
    assert [row for row, _ in shapes] == [0, 1, 1, 3, 3, 3]
    for (row, shape), size in zip(shapes, chain.from_iterable(ROWS), strict=True):
        if family == "llava_onevision" and len(ROWS[row]) > 1:
            assert shape.tokens == 17, "images that share a prompt are not cut up"
            continue
        single = processed(family, [[size]])
        assert shape.tokens == int(adapter.placeholders(single["input_ids"]).sum())
    in_prompt = adapter.placeholders(inputs["input_ids"]).sum(dim=1).tolist()
    for row, expected in enumerate(in_prompt):
        assert sum(shape.tokens for at, shape in shapes if at == row) == expected


def test_keeping_all_is_plain_generate_and_budgets_are_met_per_image(
    family: str, inputs: dict[str, Tensor]
) -> None:
    model = FAMILIES[family].build()
    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": [2, 5],
    }
    plain = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    pruner = Pruner(model)
    whole = PruneSpec(method="grid", budget=Budget(ratio=1.0))
    assert pruner.generate(inputs, whole, **settings).tokens_BT.equal(plain)
    few = PruneSpec(method="topk", budget=Budget(tokens=7))
    reports = pruner.generate(inputs, few, **settings).reports
    assert [report.visual_tokens_kept for report in reports] == [7, 14, 0, 21]


def test_planes_of_processed_images_show_the_image_s_own_pixels(
    family: str, inputs: dict[str, Tensor]
) -> None:
    adapter = adapter_for(FAMILIES[family].build())
    with torch.no_grad():
        images = adapter.encode(inputs, frozenset({"content_seed"})).images
    seeds = [[int(p.signals["content_seed"]) for p in image.planes] for image in images]
    assert len({seed for image in seeds for seed in image}) == sum(map(len, seeds))
