"""The kind of device that a replica runs on, as ledgers name it: one stratum of a measurement."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

import torch

_CPU_INFO: Final = Path("/proc/cpuinfo")


def device_name(device: str) -> str:
    """Such as "NVIDIA H200", or the model of the CPU. device: a torch device, or "auto"."""
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    if device in ("auto", "cpu"):
        return _cpu_name()
    return device


def _cpu_name() -> str:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # another system
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())
