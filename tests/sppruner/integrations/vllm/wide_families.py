"""The families under test with one attention head: the tiny models' heads are of a width that no
kernel of vLLM has."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from tests.sppruner.families import FAMILIES, base, qwen2_vl
from tests.sppruner.families.folders import write_folder

_HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}


def write_wide_folder(family: str, folder: Path) -> Path:
    """A loadable folder of a random tiny model of `family` that vLLM can run."""
    qwen = _HEADS | {"rope_parameters": _ROPE}
    with (
        mock.patch.dict(base.TEXT, _HEADS),
        mock.patch.dict(qwen2_vl.TEXT, qwen),
    ):
        return write_folder(family, folder)


__all__ = ["FAMILIES", "write_wide_folder"]
