"""Benchmark suites: every comparison is timed side by side in one run.

    python jobs/benchmark.py --suite engine --shape llava --dtype bfloat16 --markdown engine.md
    python jobs/benchmark.py --suite peers --shape llava --peer .venv-vllm/bin/python
    python jobs/benchmark.py --suite pipeline --shape llava --threads 1 --json pipeline.json
    python jobs/benchmark.py --suite saving --shape llava
    python jobs/benchmark.py --suite scale
    python jobs/benchmark.py --suite machinery --rows 1000000
    python jobs/benchmark.py --suite online
    python jobs/benchmark.py --suite selection --dtype bfloat16

`engine`: engines side by side, dense and pruned. `peers`: vLLM and Ray Data LLM beside this
project's engine and job. `pipeline`: the batch job against the bare engine
on the same images. `saving`: the saving that a run prints against separate runs. `scale`: cost of a
row as the corpus grows. `machinery`: the same without a model, up to a million rows, with memory
over time. `online`: the HTTP endpoint under load, idle and beside a batch job. `selection`: cost of
token selection beside the prefill it shortens, at the widths of 7B models. Each file in
`jobs/suites/` defines its columns; published results are in `jobs/suites/RESULTS.md`. Ratios are
medians over the rounds with their smallest and largest value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Column, Table

from cluster.console import open_console
from cluster.demo.local_s3 import LocalS3
from cluster.errors import UsageError
from jobs.arguments import check_folders
from jobs.boundary import end_with, run_command
from jobs.suites.engine import METHODS, run_engine_suite
from jobs.suites.machinery import ROWS, run_machinery_suite
from jobs.suites.online import run_online_suite
from jobs.suites.peers import run_peers_suite
from jobs.suites.pipeline import run_pipeline_suite
from jobs.suites.saving import run_saving_suite
from jobs.suites.scale import run_scale_suite
from jobs.suites.selection import run_selection_suite
from jobs.suites.shapes import SHAPES
from sppruner.errors import SpprunerError
from sppruner.models.loading import EMBEDDED

# Options that apply to one suite or to some of them; any other combination is refused.
SUITES: Final = {
    "engine": ("shape", "methods", "dtype", "peer"),
    "peers": ("shape", "dtype", "peer"),
    "pipeline": ("model", "shape", "dtype", "threads"),
    "saving": ("shape", "dtype"),
    "scale": ("model",),
    "machinery": ("model", "rows", "image_bytes"),
    "online": ("model",),
    "selection": ("dtype",),
}


def build_tables(result: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Cases and ratios by table title: rows of cells, the header first."""
    cases, ratios = result["cases"], result["ratios"]
    return {
        f"suite {result['suite']}": [
            [column.replace("_", " ") for column in cases[0]],
            *(list(map(_format_figure, case.values())) for case in cases),
        ],
        "ratios": [
            ["ratio", "median", "low", "high"],
            *([name, *map(_format_figure, value.values())] for name, value in ratios.items()),
        ],
    }


def render_tables(result: dict[str, Any]) -> list[Table]:
    """The tables for a terminal."""
    rendered = []
    for title, (head, *rows) in build_tables(result).items():
        columns = [Column(head[0], no_wrap=True)] + [Column(n, overflow="fold") for n in head[1:]]
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        rendered.append(table)
    return rendered


def format_markdown(result: dict[str, Any]) -> str:
    """The tables in GitHub Markdown, below a line that describes the machine."""
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    parts = [machine]
    for title, (head, *rows) in build_tables(result).items():
        lines = [head, ["---"] * len(head), *rows]
        parts.append(title)
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _format_figure(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        middle, low, high = map(_format_figure, value.values())
        return f"{middle} ({low} – {high})"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Benchmark suites: comparisons side by side in one run."
    )
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--quick", action="store_true", help="small workload, two rounds")
    parser.add_argument("--model", help=f"{_name_suites('model')}: folder or Hub name ({EMBEDDED})")
    parser.add_argument(
        "--shape",
        choices=list(SHAPES),
        help=f"{_name_suites('shape')}: tiny is the embedded model; the others are random weights "
        "in the proportions of a 7B model or (*-7b, needs a GPU) of its size; answers have a fixed "
        "length (engine, peers: llava; saving: tiny; pipeline: none, --model is labelled)",
    )
    parser.add_argument(
        "--methods", help=f"{_name_suites('methods')}: comma-separated ({','.join(METHODS)})"
    )
    parser.add_argument(
        "--peer",
        type=Path,
        metavar="PYTHON",
        help=f"{_name_suites('peer')}: Python of an environment with vLLM, which is timed on the "
        "same requests (peers: the one that runs this)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help=f"{_name_suites('dtype')}: model precision (selection: float32; others: bfloat16 on a "
        "GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help=f"{_name_suites('threads')}: model threads on a CPU; with fewer threads than cores "
        "Ray has the rest (all)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help=f"{_name_suites('rows')}: rows of the largest job ({ROWS})",
    )
    parser.add_argument(
        "--image-bytes",
        type=int,
        metavar="N",
        help=f"{_name_suites('image_bytes')}: size of an image (tiny ones)",
    )
    parser.add_argument("--json", type=Path, help="write the result as JSON to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    return parser


def _name_suites(option: str) -> str:
    names = [suite for suite, options in SUITES.items() if option in options]
    return f"suite{'s' if len(names) > 1 else ''} {', '.join(names)}"


def check_arguments(arguments: argparse.Namespace) -> argparse.Namespace:
    """Raises UsageError for an option that has no effect on the suite."""
    for option in sorted({option for options in SUITES.values() for option in options}):
        if getattr(arguments, option) is not None and option not in SUITES[arguments.suite]:
            raise UsageError(
                f"--{option.replace('_', '-')} is for {_name_suites(option)}: "
                f"leave it out of --suite {arguments.suite}"
            )
    if arguments.model is not None and arguments.shape is not None:
        raise UsageError(f"--shape {arguments.shape} brings its own model: leave out --model")
    if arguments.quick and arguments.methods is not None:
        raise UsageError("--methods: --quick times the headline only, leave out one of them")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads}: give at least 1")
    if arguments.rows is not None and arguments.rows < 160:
        raise UsageError(f"--rows {arguments.rows}: give at least 160")
    return arguments


def run_suite(arguments: argparse.Namespace, stderr: Console) -> dict[str, Any]:
    """Runs the chosen suite and returns its result. Raises RunErrors."""
    options: dict[str, Any] = {"quick": arguments.quick, "console": stderr}
    dtype = arguments.dtype or "auto"
    if arguments.suite == "engine":
        methods = METHODS if arguments.methods is None else arguments.methods.split(",")
        shape = SHAPES[arguments.shape or "llava"]
        return run_engine_suite(shape, methods=methods, dtype=dtype, peer=arguments.peer, **options)
    if arguments.suite == "peers":
        shape = SHAPES[arguments.shape or "llava"]
        return run_peers_suite(shape, dtype=dtype, peer=arguments.peer, **options)
    if arguments.suite == "selection":
        return run_selection_suite(dtype=getattr(torch, arguments.dtype or "float32"), **options)
    model = arguments.model or EMBEDDED
    if arguments.suite == "machinery":  # on files: the local S3 server would be what is measured
        with TemporaryDirectory() as folder:
            options |= {"rows": arguments.rows, "image_bytes": arguments.image_bytes}
            return run_machinery_suite(model, root=folder, **options)
    with LocalS3("benchmark") as server:
        options |= {"root": server.uri, "environment": server.environment}
        if arguments.suite == "scale":
            return run_scale_suite(model, **options)
        if arguments.suite == "online":
            return run_online_suite(model, **options)
        if arguments.suite == "saving":
            return run_saving_suite(SHAPES[arguments.shape or "tiny"], dtype=dtype, **options)
        random = None if arguments.shape is None else SHAPES[arguments.shape]
        return run_pipeline_suite(
            model, shape=random, dtype=dtype, threads=arguments.threads, **options
        )


def _exit_code(error: SpprunerError) -> int:
    """1 for an engine that failed, 2 for what was asked of it."""
    return 1 if error.stage == "infer" else 2


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _benchmark(arguments), argv)


def _benchmark(arguments: argparse.Namespace) -> int:
    try:
        check_folders(arguments.json, arguments.markdown)
        result = run_suite(check_arguments(arguments), open_console(stderr=True))
    except SpprunerError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return _exit_code(error)
    open_console().print(*render_tables(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(format_markdown(result))
    return 0


if __name__ == "__main__":
    end_with(main)
