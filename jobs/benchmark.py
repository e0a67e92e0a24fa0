"""Speed, side by side in one run.

    python jobs/benchmark.py --suite pipeline --json pipeline.json
    python jobs/benchmark.py --suite selection --dtype bfloat16
    python jobs/benchmark.py --suite engine --shape llava --markdown engine.md

`pipeline`: the job against the bare engine on the same images. `selection`: what choosing tokens
costs beside the prefill it shortens, at the widths of 7B models. `engine`: the engines side by
side, dense and pruned; `jobs/suites/engine.py` says what its columns cover. Ratios are medians over
the rounds with their smallest and largest value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from cluster.errors import RunError
from cluster.logs import configure_logs
from cluster.report import console
from jobs.suites.engine import METHODS, engine
from jobs.suites.pipeline import pipeline
from jobs.suites.selection import selection
from jobs.suites.shapes import SHAPES
from sppruner.engine.loading import EMBEDDED


def tables(result: dict[str, Any]) -> dict[str, list[list[str]]]:
    """The cases and the ratios by title: rows of texts, the names of columns first."""
    cases, ratios = result["cases"], result["ratios"]
    return {
        f"suite {result['suite']}": [
            [column.replace("_", " ") for column in cases[0]],
            *(list(map(_figure, case.values())) for case in cases),
        ],
        "ratios": [
            ["ratio", "median", "low", "high"],
            *([name, *map(_figure, value.values())] for name, value in ratios.items()),
        ],
    }


def shown(result: dict[str, Any]) -> list[Table]:
    """For a terminal."""
    made = []
    for title, (head, *rows) in tables(result).items():
        columns = [Column(head[0], no_wrap=True)] + [Column(n, overflow="fold") for n in head[1:]]
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def markdown(result: dict[str, Any]) -> str:
    """GitHub tables, with the machine in a line above them."""
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    parts = [about]
    for title, (head, *rows) in tables(result).items():
        lines = [head, ["---"] * len(head), *rows]
        parts.append(title)
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _figure(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        middle, low, high = map(_figure, value.values())
        return f"{middle} ({low} – {high})"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speed, side by side in one run.")
    parser.add_argument("--suite", choices=["pipeline", "selection", "engine"], required=True)
    parser.add_argument("--quick", action="store_true", help="few images, few rounds")
    parser.add_argument("--model", default=EMBEDDED, help="suite pipeline: folder or Hub name")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="suite selection"
    )
    parser.add_argument(
        "--shape",
        choices=list(SHAPES),
        default="llava",
        help="suite engine: the embedded model, or random weights in the proportions of a 7B model "
        "or of its size, which needs a GPU (%(default)s)",
    )
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="suite engine: comma between (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--markdown", type=Path, help="write its tables to this file")
    arguments = parser.parse_args(argv)
    configure_logs()
    told = console(stderr=True)
    try:
        if arguments.suite == "pipeline":
            result = pipeline(arguments.model, quick=arguments.quick, told=told)
        elif arguments.suite == "engine":
            result = engine(
                SHAPES[arguments.shape],
                methods=arguments.methods.split(","),
                quick=arguments.quick,
                told=told,
            )
        else:
            dtype = getattr(torch, arguments.dtype)
            result = selection(quick=arguments.quick, told=told, dtype=dtype)
    except RunError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return error.exit_code
    console().print(*shown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
