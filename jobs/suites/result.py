"""What every suite returns: the machine it ran on, its timed cases, and ratios with their range."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from statistics import median
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }


def ratio(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of one figure per round."""
    return {"value": median(values), "low": min(values), "high": max(values)}


def known_ratio(values: Sequence[float | None]) -> dict[str, float] | None:
    """`ratio` of a figure that may be unknown: None if it was in any round."""
    known = [value for value in values if value is not None]
    return ratio(known) if len(known) == len(values) else None


def in_turn(things: Sequence[_T], number: int) -> Sequence[_T]:
    """The order of round `number`: every other one backwards, so that nothing always runs behind
    the same."""
    return things[::-1] if number % 2 else things
