"""Evaluates pruning methods: accuracy with paired bootstrap intervals, and fidelity to dense.

    python jobs/evaluate.py --methods sppruner,random --retain 0.333,0.222,0.111
    python jobs/evaluate.py --methods "sppruner,sppruner:kappa=0,fastv:layer=1" --plot kept.png
    python jobs/evaluate.py --model llava-hf/llava-1.5-7b-hf --data pope.jsonl --images val2014

Dense always runs: every method is compared with it. `random` runs with three seeds. Without --data
the questions are about held-out drawn scenes. Exit codes: 0 done, 2 an argument that cannot work or
a model that cannot be evaluated.
"""

from __future__ import annotations

import argparse
import json
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
from jobs.arguments import check_folders, combine_specs, parse_methods, parse_shares
from jobs.boundary import end_with, run_command
from jobs.overlays import make_folder, write_overlays
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        default="sppruner,topk,grid,random",
        help="comma-separated methods, options after colons: name:option=value (%(default)s)",
    )
    parser.add_argument(
        "--retain",
        default="0.333,0.222,0.111",
        help="comma-separated shares of visual tokens kept (%(default)s)",
    )
    parser.add_argument(
        "--model",
        action="append",
        help=f"folder or Hub name; repeat for several models ({EMBEDDED})",
    )
    parser.add_argument(
        "--questions",
        type=int,
        metavar="N",
        default=1000,
        help="at least this many (%(default)s)",
    )
    parser.add_argument(
        "--batch-rows",
        type=int,
        metavar="N",
        default=64,
        help="questions per batch; fewer for large models (%(default)s)",
    )
    scenes = parser.add_argument_group("drawn scenes (the default)")
    scenes.add_argument(
        "--split",
        choices=["report", "tuning"],
        default="report",
        help="scenes of published figures, or scenes for tuning constants (%(default)s)",
    )
    scenes.add_argument(
        "--first-scene",
        type=int,
        metavar="N",
        default=0,
        help="offset into the split (%(default)s)",
    )
    data = parser.add_argument_group("your files")
    data.add_argument("--data", type=Path, metavar="FILE", help="a benchmark's file of questions")
    data.add_argument("--images", type=Path, metavar="DIR", help="the folder of its images")
    data.add_argument(
        "--format", choices=list(FORMATS), help="if the file does not tell its format"
    )
    data.add_argument(
        "--annotations", type=Path, metavar="FILE", help="the file of answers (vqav2)"
    )
    data.add_argument(
        "--instruction",
        metavar="TEXT",
        help="text after each question; '' for none (the format's own)",
    )
    out = parser.add_argument_group("results")
    out.add_argument(
        "--json", type=Path, metavar="FILE", help="records, differences between methods, versions"
    )
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    out.add_argument("--csv", type=Path, metavar="FILE", help="one record per line")
    out.add_argument(
        "--plot", type=Path, metavar="FILE", help="accuracy against kept tokens: .png, .pdf or .svg"
    )
    out.add_argument(
        "--overlay", type=Path, metavar="DIR", help="folder for pictures of the kept tokens"
    )
    return parser


def load_dataset(arguments: argparse.Namespace) -> Dataset:
    """The questions of the command line. Raises SpecError or EvaluationError."""
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
        decode=decode_file,
        format=arguments.format,
        annotations=arguments.annotations,
        instruction=arguments.instruction,
        limit=arguments.questions,
    )


def decode_file(file: Path) -> Any:
    """Decodes an image file with the limits of corpus images. Raises EvaluationError."""
    try:
        return decode_image(file.read_bytes(), MediaLimits())
    except (OSError, RowError) as error:
        raise EvaluationError(f"{file}: cannot be used: {error}") from error


@contextmanager
def show_progress(stderr: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of one model: a bar on a terminal, otherwise a plain line every 30 s. Yields the
    function to call with the number of new answers."""
    if not stderr.is_terminal:
        yield _make_line_printer(stderr, name, total)
        return
    bars = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:-1])
    with Progress(*bars, TimeRemainingColumn(), console=stderr) as bar:
        task = bar.add_task(name, total=total)
        yield lambda answers: bar.advance(task, answers)


def _make_line_printer(stderr: Console, name: str, total: int) -> Callable[[int], None]:
    started = last_line = time.monotonic()
    done = 0

    def advance(answers: int) -> None:
        nonlocal last_line, done
        done += answers
        now = time.monotonic()
        if now - last_line < _LINE_SECONDS and done < total:
            return
        last_line = now
        left = (now - started) / done * (total - done) / 60
        line = f"{name}: {done:,} of {total:,} answers, {left:.0f} min left"
        stderr.print(line, highlight=False, markup=False)

    return advance


def build_tables(document: dict[str, Any]) -> Iterator[Table]:
    """Per model: accuracy with intervals, fidelity to dense, and accuracy by kind of question with
    the majority baseline, which always gives the most frequent answer."""
    for model in document["models"]:
        entries = [entry for entry in document["rows"] if entry["model"] == model]
        metric, majority = entries[0]["metric"], document["majority_by_type"]
        for title, names in (
            (f"{model}: {metric} with 95 % intervals over images", ACCURACY),
            (f"{model}: fidelity to dense", FIDELITY),
        ):
            table = _start_table(title, [name.format(metric=metric) for name in names])
            for entry in entries:
                table.add_row(*(COLUMNS[name](entry) for name in names))
            yield table
        kinds = list(entries[0]["by_type"])
        if len(kinds) > 1:
            table = _start_table(
                f"{model}: {metric} by kind of question, %", ["method", "kept %", *kinds]
            )
            if majority:
                guessed = (percent(majority[kind]) for kind in kinds)
                table.add_row("majority answer", "", *guessed)
            for entry in entries:
                by_type = (percent(entry["by_type"][kind]) for kind in kinds)
                table.add_row(method_of(entry), percent(entry["kept_share"]), *by_type)
            yield table


def _start_table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right")
    return table


def add_model(
    document: dict[str, Any],
    loaded: LoadedModel,
    dataset: Dataset,
    specs: Sequence[PruneSpec],
    stderr: Console,
    *,
    batch_rows: int,
) -> None:
    """Evaluates one model and adds its results to the document of `--json`."""
    name = loaded.identity.name
    with show_progress(stderr, name, count_answers(dataset, specs)) as advance:
        comparison = compare(loaded, dataset, specs, batch_size=batch_rows, advance=advance)
    document["models"][name] = loaded.identity.revision
    document["rows"] += result_records(name, comparison)
    document["ahead_of"] += paired_differences(name, comparison.scores)
    document["cannot"] += (failures := unsupported_records(name, comparison))
    for failed in failures:
        kept = percent(failed["retained"])
        line = f"{name}, {failed['method']} at {kept} %: cannot: {failed['reason']}"
        stderr.print(line, style="yellow", markup=False)


def write_results(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Writes the output files that the command line names."""
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
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _evaluate(arguments), argv)


def _evaluate(arguments: argparse.Namespace) -> int:
    stderr = open_console(stderr=True)
    try:
        methods = parse_methods(arguments.methods)
        specs = combine_specs(methods, parse_shares(arguments.retain))
        if arguments.plot:
            check_plot()
        check_folders(arguments.json, arguments.markdown, arguments.csv, arguments.plot)
        if arguments.overlay:
            make_folder(arguments.overlay)
        dataset = load_dataset(arguments)
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
        # One model in memory at a time; the files are rewritten after each.
        for name in names:
            loaded = load_model(name)
            add_model(document, loaded, dataset, specs, stderr, batch_rows=arguments.batch_rows)
            write_results(document, arguments)
            if arguments.overlay:
                write_overlays(loaded, dataset, specs, arguments.overlay)
        open_console().print(*build_tables(document))
    except SpprunerError as error:
        stderr.print(f"evaluate: {error}", style="red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    end_with(main)
