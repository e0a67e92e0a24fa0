"""The recipe's forward passes equal those of the transformers model of each architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from jobs.training.families import QWEN
from jobs.training.packing import compute_answer_logits, pack_scenes
from jobs.training.scene_cache import SceneCache, build_scene_table
from jobs.training.vision import normalise_images
from jobs.training.windows import WindowVisionEncoder, patchify
from sppruner.tiny.model import build_tokenizer
from sppruner.tiny.qwen import (
    IMAGE_PAD,
    build_qwen_images,
    build_qwen_model,
    build_qwen_tokenizer,
    save_qwen,
)
from sppruner.tiny.scenes import render, sample_scene

CPU = torch.device("cpu")
SIZES = [(192, 192), (256, 192), (192, 256), (300, 100), (40, 40)]


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLForConditionalGeneration:
    return build_qwen_model(build_qwen_tokenizer()).eval()


@pytest.fixture(scope="module")
def table() -> SceneCache:
    return build_scene_table(0, 3, 92)


def _resized(size: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
    images = [render(sample_scene(seed)).resize(size) for seed in range(2)]
    arrays = [np.array(image.resize(to, Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_batched_windows_equal_the_tower_of_transformers(
    model: Qwen2_5_VLForConditionalGeneration, size: tuple[int, int]
) -> None:
    """Includes sizes with partial windows at the edges."""
    images = [render(sample_scene(seed)).resize(size) for seed in range(2)]
    inputs = build_qwen_images()(images=images, return_tensors="pt")
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    raw = _resized(size, (4 * columns, 4 * rows))
    torch.testing.assert_close(patchify(raw, 4).flatten(0, 1), inputs["pixel_values"])
    own = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    torch.testing.assert_close(WindowVisionEncoder(model)(raw)[0], torch.stack(list(own)))


def test_received_attention_is_a_distribution(model: Qwen2_5_VLForConditionalGeneration) -> None:
    received_BN = WindowVisionEncoder(model).received_attention(_resized((192, 192), (96, 96)))
    assert received_BN.shape == (2, 144)
    # A token is the mean of four patches, so the sum over tokens is a quarter.
    torch.testing.assert_close(received_BN.sum(1), torch.full((2,), 0.25))


@torch.no_grad()
def test_a_packed_question_has_the_logits_of_a_single_question(
    model: Qwen2_5_VLForConditionalGeneration, table: SceneCache
) -> None:
    """With the M-RoPE positions and the window order of transformers."""
    scenes = np.arange(3)
    images = normalise_images(table, scenes, CPU)
    text = pack_scenes(table, scenes, np.random.default_rng(0), 1.0, CPU)
    packed = compute_answer_logits(QWEN, model, WindowVisionEncoder(model)(images)[0], text)
    pad = build_qwen_tokenizer().convert_tokens_to_ids(IMAGE_PAD)
    prefix = [*QWEN.before, *[pad] * 144, *QWEN.after]
    question = 0
    for scene in scenes:
        for first, length, answer, _ in table.spans[table.starts[scene] : table.starts[scene + 1]]:
            ids = torch.tensor([prefix + table.tokens[first : first + length].tolist()])
            single = model(
                input_ids=ids,
                pixel_values=patchify(images[scene : scene + 1], 4)[0],
                image_grid_thw=torch.tensor([[1, 24, 24]]),
                mm_token_type_ids=(ids == pad).int(),
            ).logits
            torch.testing.assert_close(
                packed[text.questions_A == question],
                single[0, -1 - answer : -1],
                atol=2e-4,
                rtol=1e-4,
            )
            question += 1


def test_both_families_share_their_vocabulary() -> None:
    llava, qwen = build_tokenizer().get_vocab(), build_qwen_tokenizer().get_vocab()
    assert {word: qwen[word] for word in llava} == llava


def test_a_saved_qwen_folder_loads(
    model: Qwen2_5_VLForConditionalGeneration, tmp_path: Path
) -> None:
    save_qwen(build_qwen_model(build_qwen_tokenizer()), build_qwen_tokenizer(), tmp_path)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    images = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    grid = images(images=[render(sample_scene(0))], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 24, 24]]
    assert (tmp_path / "model.safetensors").stat().st_size < 6e6
