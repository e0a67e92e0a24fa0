"""The name of a replica's device, as ledgers have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.serving.devices import device_name


def test_a_gpu_has_its_product_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert device_name("auto") == device_name("cuda:0") == "NVIDIA H200"
    assert device_name("cpu") != "NVIDIA H200"


def test_a_cpu_has_the_name_of_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Some CPU\n")
    monkeypatch.setattr("cluster.serving.devices._CPU_INFO", info)
    assert device_name("cpu") == "Some CPU @ 2 GHz"
    info.unlink()
    assert device_name("cpu")


def test_another_device_is_named_as_it_was_asked_for() -> None:
    assert device_name("mps") == "mps"
