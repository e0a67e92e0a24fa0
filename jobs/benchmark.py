"""Speed, side by side in one run.

    python jobs/benchmark.py --suite engine --shape llava --dtype bfloat16 --markdown engine.md
    python jobs/benchmark.py --suite pipeline --shape llava --threads 1 --json pipeline.json
    python jobs/benchmark.py --suite scale
    python jobs/benchmark.py --suite online
    python jobs/benchmark.py --suite selection --dtype bfloat16

`engine`: the engines side by side, dense and pruned. `pipeline`: the job against the bare engine on
the same images. `scale`: what a row costs as the corpus grows. `online`: the endpoint under load,
idle and beside a batch job. `selection`: what choosing tokens costs beside the prefill it shortens,
at the widths of 7B models. Each file in `jobs/suites/` says what its columns cover. Ratios are
medians over the rounds with their smallest and largest value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Column, Table

from cluster.console import open_console
from cluster.demo.local_s3 import LocalS3
from cluster.errors import RunError, UsageError
from cluster.logs import configure_logs
from jobs.suites.engine import METHODS, engine
from jobs.suites.online import online
from jobs.suites.pipeline import pipeline
from jobs.suites.scale import scale
from jobs.suites.selection import selection
from jobs.suites.shapes import SHAPES
from sppruner.models.loading import EMBEDDED

# Each with the options that mean something to it alone.
SUITES: Final = {
    "engine": ("shape", "methods", "dtype", "peer"),
    "pipeline": ("model", "shape", "dtype", "threads"),
    "scale": ("model",),
    "online": ("model",),
    "selection": ("dtype",),
}


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


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Speed, side by side in one run.")
    made.add_argument("--suite", choices=SUITES, required=True)
    made.add_argument("--quick", action="store_true", help="little work, two rounds")
    made.add_argument("--model", help=f"{_for('model')}: folder or Hub name ({EMBEDDED})")
    made.add_argument(
        "--shape",
        choices=list(SHAPES),
        help=f"{_for('shape')}: the embedded model with answers of a fixed length, or random "
        "weights in the proportions of a 7B model or of its size, which needs a GPU (engine: "
        "llava; pipeline: none, but --model)",
    )
    made.add_argument("--methods", help=f"{_for('methods')}: comma between ({','.join(METHODS)})")
    made.add_argument(
        "--peer",
        type=Path,
        metavar="PYTHON",
        help=f"{_for('peer')}: interpreter of an environment with vLLM, timed on the same requests",
    )
    made.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help=f"{_for('dtype')}: of the model (selection: float32; else bfloat16 on a GPU, float32 "
        "on a CPU)",
    )
    made.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help=f"{_for('threads')}: of the model on a CPU; fewer than cores leave the others to Ray "
        "(all)",
    )
    made.add_argument("--json", type=Path, help="write the result to this file")
    made.add_argument("--markdown", type=Path, help="write its tables to this file")
    return made


def _for(option: str) -> str:
    names = [suite for suite, options in SUITES.items() if option in options]
    return f"suite{'s' if len(names) > 1 else ''} {', '.join(names)}"


def checked(arguments: argparse.Namespace) -> argparse.Namespace:
    """Raises UsageError for an option that would change nothing."""
    for option in sorted({option for options in SUITES.values() for option in options}):
        if getattr(arguments, option) is not None and option not in SUITES[arguments.suite]:
            raise UsageError(
                f"--{option} is for {_for(option)}: leave it out of --suite {arguments.suite}"
            )
    if arguments.model is not None and arguments.shape is not None:
        raise UsageError(f"--shape {arguments.shape} brings its own model: leave out --model")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads}: give at least 1")
    return arguments


def timed(arguments: argparse.Namespace, told: Console) -> dict[str, Any]:
    """The result of the suite that was asked for. Raises RunErrors."""
    how: dict[str, Any] = {"quick": arguments.quick, "told": told}
    dtype = arguments.dtype or "auto"
    if arguments.suite == "engine":
        methods = METHODS if arguments.methods is None else arguments.methods.split(",")
        shape = SHAPES[arguments.shape or "llava"]
        return engine(shape, methods=methods, dtype=dtype, peer=arguments.peer, **how)
    if arguments.suite == "selection":
        return selection(dtype=getattr(torch, arguments.dtype or "float32"), **how)
    model = arguments.model or EMBEDDED
    with LocalS3("benchmark") as server:
        how |= {"root": server.uri, "environment": server.environment}
        if arguments.suite == "scale":
            return scale(model, **how)
        if arguments.suite == "online":
            return online(model, **how)
        random = None if arguments.shape is None else SHAPES[arguments.shape]
        return pipeline(model, shape=random, dtype=dtype, threads=arguments.threads, **how)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    configure_logs()
    try:
        result = timed(checked(arguments), open_console(stderr=True))
    except RunError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return error.exit_code
    open_console().print(*shown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
