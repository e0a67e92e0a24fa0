"""The batch job as suites time it: captions from 22.2 % of the visual tokens, no control rows."""

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


def threads_of_one_replica() -> int | None:
    """As a fleet of this machine alone gives it."""
    return replica_threads(1, gpus=torch.cuda.device_count())


def captions(corpus: str, output: str, model: str, **more: Any) -> RunConfig:
    """more: further settings of the run."""
    return RunConfig(
        kind="caption",
        input=corpus,
        output=output,
        model=model,
        prompt=CAPTION_PROMPT,
        spec=SPEC,
        control_share=0.0,
        **more,
    )


def carry_out(config: RunConfig, told: Console) -> tuple[Summary, Attempt]:
    """Raises RunErrors as jobs do, EngineError where rows failed: seconds would say nothing."""
    summary = run(config, console=told).summary
    attempt = summary.attempt
    assert attempt is not None  # the output is new: there is something to do
    if summary.total.rows_failed:
        raise EngineError(f"{config.output}: rows failed, {dict(summary.total.failed)}")
    return summary, attempt
