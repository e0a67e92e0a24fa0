"""The driver runs the user's command with the fake engine, whatever that command is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UsageError
from cluster.runs import run as run_module
from cluster.serving.application import FleetSettings
from jobs import labelling_cli
from tests.chaos import driver
from tests.chaos.corpus import CorpusShape, draw_corpus
from tests.chaos.engine import SLOTS


def test_the_command_uses_the_fake_engine_and_small_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = CorpusShape(format="parquet", task="vqa", rows=40, files=1, bad=())
    (tmp_path / "in").mkdir()
    for name, data in draw_corpus(shape, 1).files.items():
        (tmp_path / "in" / name).write_bytes(data)
    opened: list[FleetSettings] = []

    def open_fleet(settings: FleetSettings, **more: Any) -> None:
        opened.append(settings)
        raise UsageError("far enough")

    monkeypatch.setattr(run_module, "open_fleet", open_fleet)
    # The driver replaces these for the life of its process.
    monkeypatch.setattr(run_module, "fleet_settings", run_module.fleet_settings)
    monkeypatch.setattr(labelling_cli, "build_config", labelling_cli.build_config)
    settings = {"task": "vqa", "input": str(tmp_path / "in"), "output": str(tmp_path / "out"),
                "replicas": 2, "unit_rows": 6, "engine": {"tag": "x"}}  # fmt: skip
    assert driver.main([json.dumps(settings)]) == 2
    (fleet,) = opened
    assert (fleet.engine.engine, fleet.engine.slots, fleet.replicas) == (driver.ENGINE, SLOTS, 2)
    assert fleet.engine.options == {"tag": "x"}
    manifest = json.loads((tmp_path / "out" / "_run" / "manifest.json").read_text())
    assert manifest["settings"]["unit_rows"] == 6
