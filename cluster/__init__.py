"""The running system: reads a corpus, labels it on model replicas, commits rows and their ledger.

    from cluster import RunConfig, run
    from sppruner import Budget, PruneSpec

    config = RunConfig(
        kind="caption",
        input="s3://bucket/images",
        output="s3://bucket/captions",
        model="llava-hf/llava-1.5-7b-hf",
        prompt="Describe the image.",
        spec=PruneSpec(method="sppruner", budget=Budget(ratio=0.222)),
    )
    outcome = run(config)
    print(outcome.summary.to_json())

Names are imported when they are first used: a worker that runs no model never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import RunConfig
    from cluster.corpus.packed import unpack_rows
    from cluster.corpus.source import read_units
    from cluster.output.run_output import RunOutput
    from cluster.output.summary import summarise
    from cluster.runs.labeller import LabellerSettings, label_units
    from cluster.runs.run import run
    from cluster.serving.application import FleetSettings, endpoint
    from cluster.serving.engine_settings import EngineSettings
    from cluster.serving.fleet import open_fleet

_HOMES = {
    "EngineSettings": "cluster.serving.engine_settings",
    "FleetSettings": "cluster.serving.application",
    "LabellerSettings": "cluster.runs.labeller",
    "RunConfig": "cluster.config",
    "RunOutput": "cluster.output.run_output",
    "endpoint": "cluster.serving.application",
    "label_units": "cluster.runs.labeller",
    "open_fleet": "cluster.serving.fleet",
    "read_units": "cluster.corpus.source",
    "run": "cluster.runs.run",
    "summarise": "cluster.output.summary",
    "unpack_rows": "cluster.corpus.packed",
}

__all__ = [
    "EngineSettings",
    "FleetSettings",
    "LabellerSettings",
    "RunConfig",
    "RunOutput",
    "endpoint",
    "label_units",
    "open_fleet",
    "read_units",
    "run",
    "summarise",
    "unpack_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
