"""Chooses a method's constants on the tuning scenes, which no report is made on.

    python jobs/tune.py --json tuned.json
    python jobs/tune.py --method sppruner:kappa=0 --grid "lam=0.3,0.5,0.7 omega=0,0.5,1"

Coordinate search: one option after the other is set to the value that does best while all others
stay, round after round, until a round changes nothing. What counts is accuracy relative to dense,
averaged over budgets and models. Ties keep the value there was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.console import open_console
from jobs.arguments import parse_methods, parse_shares, specs_of
from sppruner import PruneSpec, SpprunerError
from sppruner.errors import EvaluationError, SpecError
from sppruner.evaluation import Dataset, compare, drawn_scenes, method_label
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model
from sppruner.spec import OptionValue, parse_value

Grid = Mapping[str, Sequence[OptionValue]]

# SPpruner-R's constants, most telling first; its docstring says what they are.
GRID = (
    "lam=0.25,0.5,0.75 mu=0,0.15,0.3,0.5 omega=0,0.5,1 rho=0.6,0.8,0.95 focus_max=0.5,0.65,0.8 "
    "focus_min=0.2,0.35,0.5 eta=0.5,1 redundancy=0.8,0.9,1 sigma=0.05,0.1,0.2 windows=0,3,4,6 "
    "energy=1,2 kappa=0,0.5,1,2"
)


def parse_grid(text: str) -> dict[str, list[OptionValue]]:
    """ "name=value,value name=value,value". Raises SpecError."""
    grid: dict[str, list[OptionValue]] = {}
    for part in text.split():
        name, separator, values = part.partition("=")
        if not separator or not values:
            raise SpecError(f"--grid {part!r}: write name=value,value")
        grid[name] = [parse_value(value) for value in values.split(",")]
    return grid


def search(
    start: PruneSpec, grid: Grid, worth: Callable[[Sequence[PruneSpec]], list[float]], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yields every set of options tried with its worth and whether it is the best so far; the last
    one marked `best` is the result.

    worth: of several methods at once, so that they share the encoded images.
    """
    (best,) = worth([start])
    yield {"options": dict(start.options), "worth": best, "best": True}
    known = {start: best}
    for _ in range(rounds):
        before = start
        for name, values in grid.items():
            tried = [replace(start, options={**start.options, name: value}) for value in values]
            fresh = [spec for spec in dict.fromkeys(tried) if spec not in known]
            known.update(zip(fresh, worth(fresh), strict=True))
            top = max(tried, key=lambda spec: known[spec])
            ahead = known[top] > best
            for spec in fresh:
                chosen = ahead and spec == top
                yield {"options": dict(spec.options), "worth": known[spec], "best": chosen}
            if ahead:
                start, best = top, known[top]
        if start == before:
            return


def worth_on(
    models: Sequence[LoadedModel], dataset: Dataset, shares: Sequence[float]
) -> Callable[[Sequence[PruneSpec]], list[float]]:
    """Mean accuracy relative to dense over models and budgets; nothing for what cannot be run."""

    def worth(methods: Sequence[PruneSpec]) -> list[float]:
        if not methods:
            return []
        specs = specs_of(methods, shares)
        relative: dict[PruneSpec, list[float]] = {spec: [] for spec in specs}
        for loaded in models:
            done = compare(loaded, dataset, specs)
            if done.dense.accuracy == 0:
                raise EvaluationError(f"{loaded.identity.name} answers nothing right: no scale")
            for score in done.scores:
                relative[score.spec].append(score.accuracy / done.dense.accuracy)
        return [
            float(np.mean([np.mean(relative[s] or 0.0) for s in specs_of([method], shares)]))
            for method in methods
        ]

    return worth


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--method", default="sppruner", help="where to start (%(default)s)")
    made.add_argument("--grid", default=GRID, help="name=value,value …, searched in this order")
    made.add_argument("--retain", default="0.222,0.111,0.056", help="(%(default)s)")
    made.add_argument("--model", action="append", help=f"several times for several ({EMBEDDED})")
    made.add_argument("--questions", type=int, default=500, help="(%(default)s)")
    made.add_argument("--rounds", type=int, default=2, help="at most so many (%(default)s)")
    made.add_argument("--json", type=Path, help="everything tried, and the best")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    told = open_console(stderr=True)
    try:
        methods, grid = parse_methods(arguments.method), parse_grid(arguments.grid)
        if len(methods) != 1:
            raise SpecError(f"--method {arguments.method!r}: start from one method")
        for name, values in grid.items():
            for value in values:
                parse_methods(method_label(methods[0].method, {name: value}))
        dataset = drawn_scenes(arguments.questions, split="tuning")
        models = [load_model(name) for name in dict.fromkeys(arguments.model or [EMBEDDED])]
        worth = worth_on(models, dataset, parse_shares(arguments.retain))
        tried = []
        for step in search(methods[0], grid, worth, arguments.rounds):
            tried.append(step)
            mark = "  best so far" if step["best"] else ""
            name = method_label(methods[0].method, step["options"])
            open_console().print(
                f"{100 * step['worth']:7.3f} %  {name}{mark}",
                markup=False,
                highlight=False,
            )
    except SpprunerError as error:
        told.print(f"tune: {error}", style="red", markup=False)
        return 2
    if arguments.json:
        best = [step for step in tried if step["best"]][-1]
        document = {
            "method": methods[0].method,
            "best": best,
            "tried": tried,
            "dataset": dataset.name,
            "questions": dataset.question_count,
            "retain": parse_shares(arguments.retain),
            "models": {m.identity.name: m.identity.revision for m in models},
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
