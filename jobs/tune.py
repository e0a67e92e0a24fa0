"""Tunes a method's constants on the tuning scenes, which no published figure uses.

    python jobs/tune.py --json tuned.json
    python jobs/tune.py --method sppruner:kappa=0 --grid "lam=0.3,0.5,0.7 omega=0,0.5,1"

Coordinate search: each option in turn is set to its best value while the others stay, in rounds,
until a round changes nothing. The objective is accuracy relative to dense, averaged over budgets
and models. A tie keeps the current value. Exit codes: 0 done, 2 an argument that cannot work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.console import open_console
from jobs.arguments import check_folders, combine_specs, parse_methods, parse_shares
from jobs.boundary import end_with, run_command
from sppruner import PruneSpec, SpprunerError
from sppruner.errors import EvaluationError, SpecError
from sppruner.evaluation import Dataset, compare, drawn_scenes, method_label
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model
from sppruner.spec import OptionValue, parse_value

Grid = Mapping[str, Sequence[OptionValue]]

# SPpruner-R's constants, the most influential first; its docstring defines them.
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
    start: PruneSpec, grid: Grid, measure: Callable[[Sequence[PruneSpec]], list[float]], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yields every tried set of options with its worth and whether it is the best so far; the last
    one marked `best` is the result.

    measure: worth of several specs at once, so that they share the encoded images.
    """
    (best,) = measure([start])
    yield {"options": dict(start.options), "worth": best, "best": True}
    known = {start: best}
    for _ in range(rounds):
        before = start
        for name, values in grid.items():
            tried = [replace(start, options={**start.options, name: value}) for value in values]
            untried = [spec for spec in dict.fromkeys(tried) if spec not in known]
            known.update(zip(untried, measure(untried), strict=True))
            best_tried = max(tried, key=lambda spec: known[spec])
            improved = known[best_tried] > best
            for spec in untried:
                chosen = improved and spec == best_tried
                yield {"options": dict(spec.options), "worth": known[spec], "best": chosen}
            if improved:
                start, best = best_tried, known[best_tried]
        if start == before:
            return


def build_measure(
    models: Sequence[LoadedModel], dataset: Dataset, shares: Sequence[float]
) -> Callable[[Sequence[PruneSpec]], list[float]]:
    """A function that measures specs: mean accuracy relative to dense, over budgets and over the
    models that can run the spec; 0 if none can."""

    def measure(methods: Sequence[PruneSpec]) -> list[float]:
        if not methods:
            return []
        specs = combine_specs(methods, shares)
        relative: dict[PruneSpec, list[float]] = {spec: [] for spec in specs}
        for loaded in models:
            comparison = compare(loaded, dataset, specs)
            if comparison.dense.accuracy == 0:
                raise EvaluationError(
                    f"{loaded.identity.name} answers no question correctly: "
                    "accuracy relative to dense is undefined"
                )
            for score in comparison.scores:
                relative[score.spec].append(score.accuracy / comparison.dense.accuracy)
        return [
            float(np.mean([np.mean(relative[s] or 0.0) for s in combine_specs([method], shares)]))
            for method in methods
        ]

    return measure


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--method", default="sppruner", help="method and options to start from (%(default)s)"
    )
    parser.add_argument(
        "--grid", default=GRID, help="name=value,value …, options in the order of the search"
    )
    parser.add_argument(
        "--retain",
        default="0.222,0.111,0.056",
        help="shares of visual tokens kept, comma-separated (%(default)s)",
    )
    parser.add_argument(
        "--model", action="append", help=f"folder or Hub name; repeat for several ({EMBEDDED})"
    )
    parser.add_argument(
        "--questions", type=int, default=500, help="at least this many (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="most rounds of the search (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for everything tried and the best")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _tune(arguments), argv)


def _tune(arguments: argparse.Namespace) -> int:
    stderr = open_console(stderr=True)
    try:
        check_folders(arguments.json)
        if arguments.rounds < 1:
            raise SpecError(f"--rounds {arguments.rounds}: give at least 1")
        methods, grid = parse_methods(arguments.method), parse_grid(arguments.grid)
        if len(methods) != 1:
            raise SpecError(f"--method {arguments.method!r}: start from one method")
        for name, values in grid.items():
            for value in values:
                parse_methods(method_label(methods[0].method, {name: value}))
        dataset = drawn_scenes(arguments.questions, split="tuning")
        models = [load_model(name) for name in dict.fromkeys(arguments.model or [EMBEDDED])]
        measure = build_measure(models, dataset, parse_shares(arguments.retain))
        tried = []
        for step in search(methods[0], grid, measure, arguments.rounds):
            tried.append(step)
            mark = "  best so far" if step["best"] else ""
            name = method_label(methods[0].method, step["options"])
            open_console().print(
                f"{100 * step['worth']:7.3f} %  {name}{mark}",
                markup=False,
                highlight=False,
            )
    except SpprunerError as error:
        stderr.print(f"tune: {error}", style="red", markup=False)
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
    end_with(main)
