"""Accuracy of pruning methods on held-out scenes, with paired bootstrap intervals.

    python jobs/evaluate.py --methods sppruner,random --retain 0.333,0.222,0.111 --questions 1000

Dense always runs too: it is what every method is held against. `random` runs with three seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.report import console
from sppruner import DENSE, Budget, PruneSpec, SpprunerError, available
from sppruner.engine import BatchEngine
from sppruner.engine.loading import EMBEDDED
from sppruner.errors import SpecError
from sppruner.evaluation import Score, evaluate, held_out, majority, row

RANDOM_SEEDS = (0, 1, 2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--methods", default="sppruner,topk,grid,random", help="names, comma between"
    )
    parser.add_argument("--retain", default="0.333,0.222,0.111", help="shares kept, comma between")
    parser.add_argument("--questions", type=int, default=1000, help="at least so many questions")
    parser.add_argument("--model", default=EMBEDDED, help="folder or Hub name")
    parser.add_argument(
        "--first-scene", type=int, default=0, help="offset into the held-out scenes"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser.parse_args(argv)


def specs(methods: str, retain: str) -> list[PruneSpec]:
    """Every method at every budget. Raises SpecError."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        if name not in available():
            raise SpecError(f"no pruning method {name!r}; there are {', '.join(available())}")
    try:
        ratios = [float(share) for share in retain.split(",")]
    except ValueError as error:
        raise SpecError(f"--retain {retain!r}: give shares such as 0.333,0.222") from error
    return [
        PruneSpec(method=name, budget=Budget(ratio=ratio))
        for name in names
        if name != "none"
        for ratio in ratios
    ]


def percent(value: object) -> str:
    return "–" if value is None else f"{100 * float(str(value)):.1f}"


def tables(rows: Sequence[dict[str, Any]], baseline: dict[str, float]) -> list[Table]:
    """Overall accuracy with intervals, and accuracy by question type beside its baseline."""
    overall = Table(title="accuracy in %, 95 % intervals over scenes; captions apart")
    for column in ("method", "kept", "n", "accuracy", "interval", "of dense", "interval of it"):
        overall.add_column(column, justify="left" if column == "method" else "right")
    by_type = Table(title="exact answers by question type, %")
    for column in ("method", "kept", *baseline):
        by_type.add_column(column, justify="left" if column == "method" else "right")
    by_type.add_row("majority answer", "", *map(percent, baseline.values()))
    for entry in rows:
        name, kept = str(entry["method"]), percent(entry["kept_share"])
        overall.add_row(
            name,
            kept,
            str(entry["n"]),
            percent(entry["accuracy"]),
            f"{percent(entry['low'])} – {percent(entry['high'])}",
            percent(entry["relative_to_dense"]),
            f"{percent(entry['relative_low'])} – {percent(entry['relative_high'])}",
        )
        by_type.add_row(name, kept, *(percent(entry["by_type"][kind]) for kind in baseline))
    return [overall, by_type]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    told = console(stderr=True)
    try:
        wanted = specs(arguments.methods, arguments.retain)
        if arguments.questions < 1:
            raise SpecError(f"--questions {arguments.questions}: ask at least 1")
        engine = BatchEngine(arguments.model)
        for spec in wanted:
            engine.check(spec)
    except SpprunerError as error:
        told.print(f"evaluate: {error}", style="red", markup=False)
        return 2
    items = held_out(arguments.questions, first_scene=arguments.first_scene)
    scores: list[Score] = []
    columns = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:-1])
    with Progress(*columns, TimeRemainingColumn(), console=told) as progress:
        task = progress.add_task("dense", total=1 + len(wanted))
        for spec in [DENSE, *wanted]:
            progress.update(task, description=f"{spec.method} {spec.budget.ratio:.3f}")
            seeds = RANDOM_SEEDS if spec.method == "random" else ()
            scores.append(evaluate(engine, items, spec, seeds=seeds))
            progress.advance(task)
    rows = [row(arguments.model, score, scores[0]) for score in scores]
    baseline = majority(items)
    console().print(*tables(rows, baseline))
    if arguments.json:
        document = {"rows": rows, "majority_by_type": baseline, "torch": torch.__version__}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
