"""Speed, side by side in one run.

    python jobs/benchmark.py --suite pipeline --json pipeline.json
    python jobs/benchmark.py --suite selection --dtype bfloat16

`pipeline`: the job against the bare engine on the same images. `selection`: what choosing tokens
costs beside the prefill it shortens, at the widths of 7B models. Ratios are medians over the rounds
with their smallest and largest value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from cluster.errors import RunError
from cluster.logs import configure_logs
from cluster.report import console
from jobs.suites.pipeline import pipeline
from jobs.suites.selection import selection
from sppruner.engine.loading import EMBEDDED


def shown(result: dict[str, Any]) -> list[Table]:
    """The cases and the ratios as tables."""
    cases = Table(title=f"suite {result['suite']}", title_justify="left")
    for column in result["cases"][0]:
        cases.add_column(column.replace("_", " "))
    for case in result["cases"]:
        cases.add_row(*map(_figure, case.values()))
    ratios = Table(title="ratios", title_justify="left")
    for column in ("ratio", "median", "low", "high"):
        ratios.add_column(column)
    for name, value in result["ratios"].items():
        ratios.add_row(name, *map(_figure, value.values()))
    return [cases, ratios]


def _figure(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speed, side by side in one run.")
    parser.add_argument("--suite", choices=["pipeline", "selection"], required=True)
    parser.add_argument("--quick", action="store_true", help="few images, few rounds")
    parser.add_argument("--model", default=EMBEDDED, help="suite pipeline: folder or Hub name")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="suite selection"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args(argv)
    configure_logs()
    told = console(stderr=True)
    try:
        if arguments.suite == "pipeline":
            result = pipeline(arguments.model, quick=arguments.quick, told=told)
        else:
            dtype = getattr(torch, arguments.dtype)
            result = selection(quick=arguments.quick, told=told, dtype=dtype)
    except RunError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return error.exit_code
    console().print(*shown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
