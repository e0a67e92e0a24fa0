"""Parts of every suite's result: the machine, and figures over rounds with their range."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from statistics import linear_regression, median
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


def describe_machine() -> dict[str, Any]:
    """Processors, torch version and threads, and the load average before the suite."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }


def summarise_rounds(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of a figure with one value per round."""
    return {"value": median(values), "low": min(values), "high": max(values)}


def summarise_known_rounds(values: Sequence[float | None]) -> dict[str, float] | None:
    """`summarise_rounds` of a figure that may be unknown; None if any round lacks it."""
    known = [value for value in values if value is not None]
    return summarise_rounds(known) if len(known) == len(values) else None


def alternate(items: Sequence[_T], number: int) -> Sequence[_T]:
    """The order of round `number`: reversed in every second round, so that no participant always
    follows the same one."""
    return items[::-1] if number % 2 else items


def fit_power(points: Sequence[tuple[float, float]]) -> float:
    """p of y ~ x ** p, by least squares in logarithms, of (x, y) above zero: 1 where y grows as x
    does."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    return linear_regression(xs, ys).slope
