"""A model's revision pins its content; what cannot be loaded says why."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from sppruner.engine.loading import load_processor, resolve_model
from sppruner.errors import UnsupportedModel
from sppruner.tiny.model import build_model, build_processor, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `resolve_model` looks at; it reads no weights."""
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


def test_notes_hidden_files_and_the_place_do_not_change_the_revision(folder: Path) -> None:
    before = revision(folder)
    (folder / "README.md").write_text("more about")
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


def test_a_folder_with_a_hidden_name_is_still_pinned_by_its_weights(folder: Path) -> None:
    hidden = folder.rename(folder.parent / ".model")
    before = revision(hidden)
    (hidden / "model.safetensors").write_bytes(b"weighty")
    assert revision(hidden) != before


def test_a_folder_of_another_revision_than_asked_for_is_refused(folder: Path) -> None:
    held = revision(folder)
    assert resolve_model(str(folder), held).revision == held
    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UnsupportedModel, match=held):
        resolve_model(str(folder), held)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_holds_no_model_says_what_is_missing(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(UnsupportedModel, match=missing.replace("model", "")):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["someone/no-such-model", "no/such/folder", "../nowhere"])
def test_a_name_that_cannot_be_had_offline_fails_at_once(
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
