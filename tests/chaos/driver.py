"""The user's command, with the fake engine and small units; everything else is the real one.

    python -m tests.chaos.driver SETTINGS

SETTINGS is JSON: task, input, output, replicas, unit_rows, engine options. No flag of the command
sets the engine or the size of units, so this process replaces them where the command builds its
settings; the replicas get them as they get any other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from cluster.config import RunConfig
from cluster.runs import run as run_module
from cluster.serving.application import FleetSettings
from jobs import answer_vqa, caption_corpus, labelling_cli
from tests.chaos.engine import RETAIN, SLOTS

ENGINE: Final = "tests.chaos.engine:ChaosEngine"
FIRST_STEP_SECONDS: Final = 45.0
STEP_SECONDS: Final = 20.0
"""Silence after which a replica counts as hung: well below that after which a run does."""


def fake(settings: FleetSettings, options: Mapping[str, Any]) -> FleetSettings:
    """These replicas, with the fake engine."""
    engine = replace(
        settings.engine,
        engine=ENGINE,
        options=options,
        slots=SLOTS,
        first_step_seconds=FIRST_STEP_SECONDS,
        step_seconds=STEP_SECONDS,
    )
    return replace(settings, engine=engine)


def main(argv: list[str]) -> int:
    """Runs the command; its exit code."""
    given = json.loads(argv[0])
    build_fleet_settings, build_config = run_module.fleet_settings, labelling_cli.build_config

    def fleet_settings(*args: Any, **more: Any) -> FleetSettings:
        return fake(build_fleet_settings(*args, **more), given["engine"])

    def config(*args: Any, **more: Any) -> RunConfig:
        built = build_config(*args, **more)
        return replace(
            built, unit_rows=given["unit_rows"], slots=SLOTS, control_blocks=3, max_attempts=2
        )

    run_module.fleet_settings, labelling_cli.build_config = fleet_settings, config
    job = caption_corpus.JOB if given["task"] == "caption" else answer_vqa.JOB
    prompt = [] if given["task"] == "caption" else ["--prompt", "{question}"]
    return labelling_cli.main(
        job,
        ["--input", given["input"], "--output", given["output"], "--retain", str(RETAIN),
         "--replicas", str(given["replicas"]), *prompt],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
