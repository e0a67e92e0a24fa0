"""The families under test with one attention head: the tiny models' heads are of a width that no
kernel of vLLM has."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

from tests.sppruner.families import FAMILIES, base, qwen2_vl
from tests.sppruner.families.folders import write_folder

_ASPECTS = "anyres_max_9"
_HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}
_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [6, 5, 5],
    # transformers' Qwen3-VL does so whatever the config says, vLLM's only if it does.
    "mrope_interleaved": True,
}


def write_wide_folder(family: str, folder: Path, *, by_bytes: bool = False) -> Path:
    """A loadable folder of a random tiny model of `family` that vLLM can run."""
    qwen = (
        _HEADS | {"head_dim": 32, "rope_parameters": _ROPE}
        if family == "qwen3_vl"
        else (_HEADS | {"rope_parameters": {k: v for k, v in _ROPE.items() if "inter" not in k}})
    )
    with mock.patch.dict(base.TEXT, _HEADS), mock.patch.dict(qwen2_vl.TEXT, qwen):
        write_folder(family, folder, by_bytes=by_bytes)
    if family == "llava_onevision":
        # vLLM cuts images so whatever a config says.
        for name in ("config.json", "processor_config.json"):
            settings = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(settings | {"vision_aspect_ratio": _ASPECTS}))
    return folder


__all__ = ["FAMILIES", "write_wide_folder"]
