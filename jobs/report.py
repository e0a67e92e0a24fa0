"""Reports what a run did and saved, from its output only, during the run or afterwards.

    python jobs/report.py s3://bucket/captions
    python jobs/report.py s3://bucket/captions --json
    python jobs/report.py s3://bucket/captions --audit
    python jobs/report.py s3://bucket/captions --overlay seen --rows 20

--audit reads every row, recomputes what the run says of itself, and names what differs; with
differences the exit code is 1, and 5 without any in a run that has not ended. --overlay draws the
visual tokens that rows kept, one `<number>-<key>.png` per row; it needs the run's model and images.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import UsageError
from cluster.output.audit import audit
from cluster.output.run_output import RunOutput
from cluster.output.summary import Summary, summarise
from cluster.report.terminal import print_report
from jobs.boundary import end_with, run_command

EXIT_DIFFERENCES, EXIT_OPEN = 1, 5
_ROWS = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Reports what a run did and saved, from its output only."
    )
    parser.add_argument("output", help="the --output of a job")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the summary as JSON")
    shown.add_argument(
        "--audit",
        action="store_true",
        help="recompute every total from the rows, and name what differs",
    )
    parser.add_argument(
        "--price-per-hour",
        type=float,
        metavar="X",
        help="of one replica: shows what the run cost and saved in money",
    )
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="DIR",
        help="folder for pictures of the tokens that rows kept",
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help=f"draw the first N labelled rows ({_ROWS})"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _report(arguments), argv)


def _report(arguments: argparse.Namespace) -> int:
    _check(arguments.overlay, arguments.rows)
    price = arguments.price_per_hour
    if price is not None and not 0 < price < math.inf:
        raise UsageError(f"--price-per-hour {price}: give a price above 0")
    if price is not None and (arguments.audit or arguments.json):
        raise UsageError("--price-per-hour goes with the report: leave out --audit and --json")
    if arguments.audit and arguments.overlay is not None:
        raise UsageError("--audit draws no pictures: leave out --overlay")
    if arguments.audit:
        return _audit(arguments.output)
    summary = summarise(arguments.output)
    if arguments.json:
        print(summary.to_json())
    else:
        print_report(summary, price=price)
    if arguments.overlay is not None:
        _draw(summary, arguments.overlay, arguments.rows or _ROWS)
    return 0


def _audit(output: str) -> int:
    found = audit(RunOutput.open(output))
    for difference in found.differences:
        print(f"{difference.where}: {difference.what}")
    if found.open:
        print(f"not ended: {found.open} of {found.open + found.units} units are not committed")
    print(f"{found.units} units, {found.rows} rows, {len(found.differences)} differences")
    if found.differences:
        return EXIT_DIFFERENCES
    return EXIT_OPEN if found.open else 0


def _check(overlay: Path | None, rows: int | None) -> None:
    """Raises UsageError for --rows without --overlay or below 1."""
    if rows is None:
        return
    if overlay is None:
        raise UsageError("--rows goes with --overlay: give a folder for the pictures")
    if rows < 1:
        raise UsageError(f"--rows {rows}: give at least 1")


def _draw(summary: Summary, folder: Path, rows: int) -> None:
    from jobs.overlays import write_row_overlays  # imports torch, which a plain report avoids

    written = write_row_overlays(summary, folder, rows=rows)
    print(f"{len(written)} pictures in {folder}, {written[0].name} first", file=sys.stderr)


if __name__ == "__main__":
    end_with(main)
