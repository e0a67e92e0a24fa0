"""What every suite returns: the machine it ran on, its timed cases, and ratios with their range."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch


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
