"""The batch job that suites time: captions with 22.2 % of the visual tokens, nothing measured."""

from __future__ import annotations

from typing import Any, Final

import torch
from rich.console import Console

from cluster.config import RunConfig
from cluster.output.summary import Attempt, Summary
from cluster.runs.run import run
from cluster.serving.application import replica_threads
from sppruner import Budget, PruneSpec
from sppruner.errors import EngineError
from sppruner.tiny.questions import CAPTION_PROMPT

SPEC: Final = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))


def count_replica_threads() -> int | None:
    """Torch threads of a replica that has this machine to itself."""
    return replica_threads(1, gpus=torch.cuda.device_count())


def build_caption_config(corpus: str, output: str, model: str, **more: Any) -> RunConfig:
    """The run's configuration; `more` are further RunConfig fields."""
    return RunConfig(
        kind="caption",
        input=corpus,
        output=output,
        model=model,
        prompt=CAPTION_PROMPT,
        spec=SPEC,
        control_blocks=0,
        **more,
    )


def run_job(config: RunConfig, console: Console) -> tuple[Summary, Attempt]:
    """Runs the job to its end.

    Raises RunErrors as `run` does, and EngineError if rows failed: their time is no measurement.
    """
    summary = run(config, console=console).summary
    attempt = summary.attempt
    assert attempt is not None  # the output is new, so the run has units to label
    if summary.total.rows_failed:
        raise EngineError(f"{config.output}: rows failed, {dict(summary.total.failed)}")
    return summary, attempt
