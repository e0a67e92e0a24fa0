"""A model folder's training history is read back; any other file is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.training.history import History
from sppruner.errors import UnsupportedModel

STEPS = {"language": 10, "vision": 20, "sharpen": 3, "joint": 7}


def test_a_history_is_read_back_and_counts_all_joint_steps(tmp_path: Path) -> None:
    history = History(**STEPS, note="by hand").continued(5).continued(2)
    history.write(tmp_path)
    assert History.read(tmp_path) == history
    assert history.joint_steps == 14
    assert history.joint == 7


@pytest.mark.parametrize(
    "written",
    [
        "{}",
        "[]",
        "null",
        "{",
        "\xff",
        json.dumps(STEPS | {"else": 1}),
        json.dumps(STEPS | {"joint": "2000"}),
        json.dumps(STEPS | {"joint": None}),
        json.dumps(STEPS | {"again": -1}),
        json.dumps(STEPS | {"note": 1}),
    ],
)
def test_a_file_without_a_history_is_named(written: str, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_bytes(written.encode("latin-1"))
    with pytest.raises(UnsupportedModel, match=r"training\.json tells no history") as raised:
        History.read(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_folder_without_a_history_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"holds no training\.json"):
        History.read(tmp_path / "nowhere")
