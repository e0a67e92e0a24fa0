"""Finds and loads a model: a name, a revision that pins its content, weights, processor.

safetensors only and no remote code: loading a model never runs code that comes with it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from sppruner.errors import UnsupportedModel
from sppruner.models.processors import processor_of
from sppruner.tiny import EMBEDDED as EMBEDDED
from sppruner.tiny import TINY_MODELS

# Larger weight files are hashed at their two ends only: hashing 15 GB takes a minute.
_WHOLE_FILE_BYTES = 64 * 2**20
_END_BYTES = 2**20
# How `jobs.training` trained the model; no part of what the model does.
_HISTORY_FILE = Path("training.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which model it is, pinned by content."""

    name: str
    """The name or folder that was given."""

    path: str
    """The folder that holds the model."""

    revision: str
    """Pins the content: the commit of a Hub model, a content hash of a local folder."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A model with its weights and processor."""

    identity: ModelIdentity
    """Which model it is."""

    model: Any
    """The `transformers` model, in evaluation mode on its device."""

    processor: Any
    """Its processor, which pads on the left."""

    image_backend: str
    """"pil" or "torchvision", see `image_backend`."""


def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or path.suffix == ".md" or inside == _HISTORY_FILE:
            continue
        size = path.stat().st_size
        digest.update(f"{inside}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(_END_BYTES))
                file.seek(-_END_BYTES, os.SEEK_END)
                digest.update(file.read(_END_BYTES))
    return digest.hexdigest()[:16]


def is_local(name: str) -> bool:
    """Whether the name is that of an embedded model or a folder, rather than the Hub's."""
    return TINY_MODELS.get(name, Path(name)).is_dir()


def resolve_model(name: str, revision: str | None = None) -> ModelIdentity:
    """Pins an embedded model, a local folder (by content) or a Hub model (by commit).

    Downloads a Hub model if it is not cached (HF_HOME and HF_HUB_OFFLINE are honoured). Raises
    UnsupportedModel for a model that does not exist or has no safetensors.
    """
    folder = TINY_MODELS.get(name, Path(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnsupportedModel(f"{folder} holds no config.json: not a model folder")
        if not list(folder.glob("*.safetensors")):
            raise UnsupportedModel(f"{folder} holds no *.safetensors: other formats are not loaded")
        content = _content_hash(folder)
        if revision not in (None, content):
            raise UnsupportedModel(
                f"{folder} holds revision {content}, not {revision}: its files were changed"
            )
        return ModelIdentity(name=name, path=str(folder), revision=content)
    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnsupportedModel(
            f"no model {name!r}: not one of {', '.join(TINY_MODELS)}, not a local folder, and not "
            f"available from the Hub ({type(error).__name__}). Give a folder, or check HF_HOME and "
            "HF_HUB_OFFLINE"
        ) from error
    if not list(Path(path).glob("*.safetensors")):
        raise UnsupportedModel(f"{name!r} has no *.safetensors: other formats are not loaded")
    # A snapshot's folder is named after its commit.
    return ModelIdentity(name=name, path=path, revision=Path(path).name)


def image_backend(processor: Any) -> str:
    """The processor's image backend, "pil" or "torchvision": their pixels differ slightly, so a run
    records which one it used."""
    return "pil" if type(processor.image_processor).__name__.endswith("Pil") else "torchvision"


def load_processor(identity: ModelIdentity) -> Any:
    """The model's processor, set to pad on the left, as `generate` requires."""
    processor = processor_of(load_config(identity), identity.path)
    processor.tokenizer.padding_side = "left"
    return processor


def load_config(identity: ModelIdentity) -> Any:
    return AutoConfig.from_pretrained(identity.path, trust_remote_code=False)


def load_generation_config(identity: ModelIdentity) -> GenerationConfig:
    """What the loaded model would have as `generation_config`, without its weights."""
    try:
        return GenerationConfig.from_pretrained(identity.path)
    except OSError:  # transformers then reads what the model's config says of generation
        return GenerationConfig.from_pretrained(
            identity.path, config_file_name="config.json", _from_model_config=True
        )


def dtype_on(device: str, dtype: str) -> str:
    """The dtype of a model on a device: auto is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return "bfloat16" if device.startswith("cuda") else "float32"
    return dtype


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> LoadedModel:
    """Loads weights and processor.

    device: "auto" is the GPU if there is one. dtype: see `dtype_on`. Raises UnsupportedModel.
    """
    identity = resolve_model(name, revision)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # a job's log would hold every redraw of it
    model = AutoModelForImageTextToText.from_pretrained(
        identity.path, dtype=dtype_on(device, dtype), use_safetensors=True, trust_remote_code=False
    )
    processor = load_processor(identity)
    return LoadedModel(
        identity=identity,
        model=model.eval().to(device),
        processor=processor,
        image_backend=image_backend(processor),
    )
