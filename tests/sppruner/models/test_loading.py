"""A model's revision pins its content; an error says why a model cannot be loaded."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image

from jobs.training.history import History
from sppruner.engine import BatchEngine, Request, Result, SamplingParams, run_all
from sppruner.engine.interface import Update
from sppruner.engine.run_all import answer_all
from sppruner.errors import InputError, UnsupportedModel
from sppruner.models.loading import (
    load_generation_config,
    load_model,
    load_processor,
    resolve_model,
)
from sppruner.spec import DENSE, Budget, PruneSpec
from sppruner.tiny import TINY_MODELS
from sppruner.tiny.model import build_model, build_processor, save
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that `resolve_model` reads; it loads no weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llava"}')
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "README.md").write_text("about")
    return path


def revision(folder: Path) -> str:
    return resolve_model(str(folder)).revision


def test_a_folder_is_pinned_by_its_weights_and_settings(folder: Path) -> None:
    before = revision(folder)
    assert revision(folder) == before
    (folder / "model.safetensors").write_bytes(b"weighty")
    changed = revision(folder)
    assert changed != before
    (folder / "config.json").write_text('{"model_type": "llava" }')
    assert revision(folder) not in (before, changed)


def test_notes_hidden_files_and_location_do_not_change_the_revision(folder: Path) -> None:
    before = revision(folder)
    (folder / "README.md").write_text("more about")
    History(language=1, vision=1, sharpen=1, joint=1, note="by hand").write(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("1")
    (folder / ".gitattributes").write_text("x")
    assert revision(folder) == before
    moved = folder.rename(folder.parent / "moved")
    assert revision(moved) == before


def test_a_renamed_file_changes_the_revision(folder: Path) -> None:
    before = revision(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert revision(folder) != before


def test_every_json_file_but_the_training_history_changes_the_revision(folder: Path) -> None:
    before = revision(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert revision(folder) != before


def test_a_folder_with_a_hidden_name_is_still_pinned_by_its_weights(folder: Path) -> None:
    hidden = folder.rename(folder.parent / ".model")
    before = revision(hidden)
    (hidden / "model.safetensors").write_bytes(b"weighty")
    assert revision(hidden) != before


def test_a_folder_of_another_revision_is_refused(folder: Path) -> None:
    held = revision(folder)
    assert resolve_model(str(folder), held).revision == held
    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UnsupportedModel, match=held):
        resolve_model(str(folder), held)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused_with_what_is_missing(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(UnsupportedModel, match=missing.replace("model", "")):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["someone/no-such-model", "no/such/folder", "../nowhere"])
def test_an_unknown_name_fails_at_once_when_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(UnsupportedModel, match="HF_HUB_OFFLINE"):
        resolve_model(name)
    assert time.perf_counter() - started < 5


def test_the_processor_pads_on_the_left_whatever_was_saved(tmp_path: Path) -> None:
    processor = build_processor()
    processor.tokenizer.padding_side = "right"
    save(build_model(processor.tokenizer), processor, tmp_path)
    assert load_processor(resolve_model(str(tmp_path))).tokenizer.padding_side == "left"


def drawn(seed: int, width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def requests(spec: PruneSpec) -> list[Request]:
    """Images of different sizes and shapes, one row with two of them, one with none."""
    groups = [(drawn(1, 50, 30),), (drawn(2, 24, 60), drawn(3, 33, 33)), ()]
    return [
        Request(
            id=str(len(images)),
            prompt=f"what is in {len(images)}?",
            images=images,
            spec=spec,
            generation=SamplingParams(max_new_tokens=4),
        )
        for images in groups
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BatchEngine:
    loaded = load_model(str(write_folder(request.param, tmp_path_factory.mktemp(request.param))))
    assert loaded.image_backend == "pil"
    assert loaded.processor.tokenizer.padding_side == "left"
    return BatchEngine(loaded)


@pytest.mark.parametrize("ratio", [None, 0.25])
def test_a_folder_of_every_family_loads_without_torchvision_and_answers(
    engine: BatchEngine, ratio: float | None
) -> None:
    """In a batch as by themselves, which needs left padding and pixels in prompt order."""
    spec = DENSE if ratio is None else PruneSpec(method="grid", budget=Budget(ratio=ratio))
    batch = requests(spec)
    together = engine.run(batch)
    for one, result in zip(batch, together, strict=True):
        assert result.error_message is None
        assert result.visual_tokens >= 16 * len(one.images)
        if ratio is None:
            assert result.visual_tokens_kept == result.visual_tokens
        else:
            wanted = ratio * result.visual_tokens
            assert abs(result.visual_tokens_kept - wanted) <= 0.5 * len(one.images)
        (single,) = engine.run([one])
        assert single.text == result.text
        assert single.prompt_tokens == result.prompt_tokens


def test_a_warm_up_answers_dense_and_pruned_and_changes_no_later_answer(
    engine: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = requests(DENSE) + requests(PruneSpec(method="grid", budget=Budget(ratio=0.25)))
    before = engine.run(batch)
    warmed: list[tuple[PruneSpec, Result]] = []

    def recording(to: BatchEngine, given: list[Request]) -> tuple[list[Result], list[Update]]:
        results, others = answer_all(to, given)
        warmed.extend((one.spec, result) for one, result in zip(given, results, strict=True))
        return results, others

    with monkeypatch.context() as patch:
        patch.setattr(run_all, "answer_all", recording)
        engine.warm_up()
    assert {spec.is_dense for spec, _ in warmed} == {True, False}
    for spec, result in warmed:
        assert result.completion_tokens > 0
        assert result.visual_tokens > 0
        assert (result.visual_tokens_kept < result.visual_tokens) == (not spec.is_dense)
    after = engine.run(batch)
    assert [replace(r, seconds=0) for r in after] == [replace(r, seconds=0) for r in before]


def test_placeholders_of_images_and_videos_are_refused_and_never_generated(
    engine: BatchEngine,
) -> None:
    processor, config = engine._processor, engine._model.config
    (one, *_) = requests(DENSE)
    suppressed = engine._generate_kwargs(one.generation)["suppress_tokens"]
    assert config.image_token_id in suppressed
    assert getattr(config, "video_token_id", config.image_token_id) in suppressed
    words = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
    for word in filter(None, words):
        for hostile in (replace(one, prompt=f"what is {word}?"), replace(one, system=word)):
            (result,) = engine.run([hostile])
            assert result.error_code == "prompt_invalid"
            assert word in str(result.error_message)


def test_a_processor_without_torchvision_refuses_videos(tmp_path: Path) -> None:
    processor = load_processor(resolve_model(str(write_folder("qwen2_vl", tmp_path))))
    video = torch.zeros(2, 3, 16, 16)
    with pytest.raises(InputError, match="images only"):
        processor(text=["<|video_pad|>"], videos=[video], return_tensors="pt")


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen"])
@pytest.mark.parametrize("settings", [None, {}, {"eos_token_id": [2, 5], "top_k": 3}])
def test_the_generation_config_is_that_of_the_loaded_model(
    name: str, settings: dict[str, object] | None, tmp_path: Path
) -> None:
    """Also where a checkpoint has no file of it."""
    folder = shutil.copytree(TINY_MODELS[name], tmp_path / "model")
    file = folder / "generation_config.json"
    if settings is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    expected = load_model(str(folder)).model.generation_config.to_dict()
    assert load_generation_config(resolve_model(str(folder))).to_dict() == expected
