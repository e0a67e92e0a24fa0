"""Accuracy of pruning methods, with paired bootstrap intervals and fidelity to the full model.

    python jobs/evaluate.py --methods sppruner,random --retain 0.333,0.222,0.111
    python jobs/evaluate.py --methods "sppruner,sppruner:kappa=0,fastv:layer=1" --plot kept.png
    python jobs/evaluate.py --model llava-hf/llava-1.5-7b-hf --data pope.jsonl --images val2014

Dense always runs too: it is what every method is held against. `random` runs with three seeds.
Without --data the questions are about held-out drawn scenes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.config import MediaLimits
from cluster.console import open_console
from cluster.errors import RowError
from cluster.images import decode_image
from jobs.arguments import parse_methods, parse_shares, specs_of
from jobs.overlays import write_overlays
from sppruner import PruneSpec, SpprunerError
from sppruner.errors import EvaluationError, SpecError
from sppruner.evaluation import (
    FORMATS,
    Dataset,
    compare,
    count_answers,
    drawn_scenes,
    paired_differences,
    read_dataset,
    result_records,
    unsupported_records,
)
from sppruner.evaluation.plot import check_plot, plot
from sppruner.evaluation.tables import (
    ACCURACY,
    COLUMNS,
    FIDELITY,
    comma_separated,
    markdown,
    method_of,
    percent,
)
from sppruner.models.loading import EMBEDDED, LoadedModel, load_model, resolve_model

_LINE_SECONDS = 30


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--methods",
        default="sppruner,topk,grid,random",
        help="comma between methods, options after colons: name:option=value (%(default)s)",
    )
    made.add_argument(
        "--retain",
        default="0.333,0.222,0.111",
        help="shares of visual tokens kept, comma between (%(default)s)",
    )
    made.add_argument(
        "--model",
        action="append",
        help=f"folder or Hub name; several times for several models ({EMBEDDED})",
    )
    made.add_argument(
        "--questions",
        type=int,
        metavar="N",
        default=1000,
        help="ask at least so many (%(default)s)",
    )
    made.add_argument(
        "--batch-rows",
        type=int,
        metavar="N",
        default=64,
        help="questions at once; fewer for large models (64)",
    )
    asked = made.add_argument_group("drawn scenes (the default)")
    asked.add_argument(
        "--split",
        choices=["report", "tuning"],
        default="report",
        help="scenes that are reported, or those that constants are chosen on (%(default)s)",
    )
    asked.add_argument(
        "--first-scene", type=int, metavar="N", default=0, help="offset into the split"
    )
    data = made.add_argument_group("your files")
    data.add_argument("--data", type=Path, metavar="FILE", help="a benchmark's file of questions")
    data.add_argument("--images", type=Path, metavar="DIR", help="the folder of its images")
    data.add_argument("--format", choices=list(FORMATS), help="where the file does not tell")
    data.add_argument(
        "--annotations", type=Path, metavar="FILE", help="the file of answers (vqav2)"
    )
    data.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what follows each question; '' for nothing (the format's own)",
    )
    out = made.add_argument_group("results")
    out.add_argument(
        "--json", type=Path, metavar="FILE", help="rows, differences between methods, versions"
    )
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    out.add_argument("--csv", type=Path, metavar="FILE", help="the rows, flat")
    out.add_argument(
        "--plot", type=Path, metavar="FILE", help="accuracy against kept tokens: .png, .pdf or .svg"
    )
    out.add_argument(
        "--overlay", type=Path, metavar="DIR", help="folder for pictures of what is kept"
    )
    return made


def dataset_of(arguments: argparse.Namespace) -> Dataset:
    """What to ask. Raises SpecError or EvaluationError."""
    for option in ("questions", "batch_rows"):
        if (number := getattr(arguments, option)) < 1:
            raise SpecError(f"--{option.replace('_', '-')} {number}: give at least 1")
    if arguments.data is None:
        for option in ("images", "format", "annotations", "instruction"):
            if getattr(arguments, option) is not None:
                raise SpecError(f"--{option} goes with --data: give the file of questions too")
        return drawn_scenes(
            arguments.questions, first_scene=arguments.first_scene, split=arguments.split
        )
    if arguments.images is None:
        raise SpecError("--data needs --images: the folder that holds the file's images")
    return read_dataset(
        arguments.data,
        images=arguments.images,
        decode=decoded,
        format=arguments.format,
        annotations=arguments.annotations,
        instruction=arguments.instruction,
        limit=arguments.questions,
    )


def decoded(file: Path) -> Any:
    """An image file under the same limits as a corpus's images. Raises EvaluationError."""
    try:
        return decode_image(file.read_bytes(), MediaLimits())
    except (OSError, RowError) as error:
        raise EvaluationError(f"{file}: cannot be used: {error}") from error


@contextmanager
def progress(told: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left on a terminal; in a log, a plain line now and then."""
    if not told.is_terminal:
        yield _plain_lines(told, name, total)
        return
    bars = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:-1])
    with Progress(*bars, TimeRemainingColumn(), console=told) as bar:
        task = bar.add_task(name, total=total)
        yield lambda answers: bar.advance(task, answers)


def _plain_lines(told: Console, name: str, total: int) -> Callable[[int], None]:
    began = said = time.monotonic()
    done = 0

    def advance(answers: int) -> None:
        nonlocal said, done
        done += answers
        now = time.monotonic()
        if now - said < _LINE_SECONDS and done < total:
            return
        said = now
        left = (now - began) / done * (total - done) / 60
        line = f"{name}: {done:,} of {total:,} answers, {left:.0f} min left"
        told.print(line, highlight=False, markup=False)

    return advance


def tables(document: dict[str, Any]) -> Iterator[Table]:
    """Per model: accuracy with intervals, fidelity to dense, and accuracy by kind of question
    beside what always giving the most frequent answer would score."""
    for model in document["models"]:
        entries = [entry for entry in document["rows"] if entry["model"] == model]
        metric, majority = entries[0]["metric"], document["majority_by_type"]
        for title, names in (
            (f"{model}: {metric} with 95 % intervals over images", ACCURACY),
            (f"{model}: fidelity to dense", FIDELITY),
        ):
            table = _table(title, [name.format(metric=metric) for name in names])
            for entry in entries:
                table.add_row(*(COLUMNS[name](entry) for name in names))
            yield table
        kinds = list(entries[0]["by_type"])
        if len(kinds) > 1:
            table = _table(
                f"{model}: {metric} by kind of question, %", ["method", "kept %", *kinds]
            )
            if majority:
                guessed = (percent(majority[kind]) for kind in kinds)
                table.add_row("majority answer", "", *guessed)
            for entry in entries:
                by_type = (percent(entry["by_type"][kind]) for kind in kinds)
                table.add_row(method_of(entry), percent(entry["kept_share"]), *by_type)
            yield table


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right")
    return table


def add_model(
    document: dict[str, Any],
    loaded: LoadedModel,
    dataset: Dataset,
    specs: Sequence[PruneSpec],
    told: Console,
    *,
    batch_rows: int,
) -> None:
    """Evaluates one model into the document of `--json`."""
    name = loaded.identity.name
    with progress(told, name, count_answers(dataset, specs)) as advance:
        comparison = compare(loaded, dataset, specs, batch_size=batch_rows, advance=advance)
    document["models"][name] = loaded.identity.revision
    document["rows"] += result_records(name, comparison)
    document["ahead_of"] += paired_differences(name, comparison.scores)
    document["cannot"] += (failures := unsupported_records(name, comparison))
    for failed in failures:
        kept = percent(failed["retained"])
        line = f"{name}, {failed['method']} at {kept} %: cannot: {failed['reason']}"
        told.print(line, style="yellow", markup=False)


def write(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The files that were asked for."""
    entries, failed = document["rows"], document["cannot"]
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(entries, failed))
    if arguments.csv:
        arguments.csv.write_text(comma_separated(entries))
    if arguments.plot:
        plot(entries, arguments.plot)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    told = open_console(stderr=True)
    try:
        methods = parse_methods(arguments.methods)
        specs = specs_of(methods, parse_shares(arguments.retain))
        if arguments.plot:
            check_plot()
        for file in (arguments.json, arguments.markdown, arguments.csv, arguments.plot):
            if file is not None and not file.absolute().parent.is_dir():
                raise EvaluationError(f"{file}: its folder does not exist; make it first")
        dataset = dataset_of(arguments)
        names = list(dict.fromkeys(arguments.model or [EMBEDDED]))
        for name in names:
            resolve_model(name)
        document: dict[str, Any] = {
            "dataset": dataset.name,
            "rows": [],
            "ahead_of": [],
            "cannot": [],
            "majority_by_type": dataset.majority_baseline(),
            "models": {},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        for name in names:  # one in memory at a time, and what is done is written
            loaded = load_model(name)
            add_model(document, loaded, dataset, specs, told, batch_rows=arguments.batch_rows)
            write(document, arguments)
            if arguments.overlay:
                write_overlays(loaded, dataset, specs, arguments.overlay)
        open_console().print(*tables(document))
    except SpprunerError as error:
        told.print(f"evaluate: {error}", style="red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
