"""Labels failed rows of a run again, under the settings that its output keeps.

    python jobs/retry_errors.py s3://bucket/captions
    python jobs/retry_errors.py s3://bucket/captions --codes read_failed,inference_failed

Answers are never replaced, and readers of the output see each row once at any moment. Exit codes
are those of the labelling commands: 0 if no failed row remains, 3 if some do, 5 if the run is not
complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from cluster.config import RunConfig
from cluster.console import open_console
from jobs.boundary import end_with, run_command
from jobs.labelling_cli import report_shown
from sppruner.engine.interface import DTYPES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="the --output of a job")
    parser.add_argument(
        "--codes",
        default="",
        help="error codes, comma-separated (all that may succeed over an unchanged corpus)",
    )
    parser.add_argument("--replicas", type=int, default=1, help="model replicas (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the replicas, where those here have another by themselves than the run's had",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = build_parser().parse_args(argv)
    return run_command(
        lambda: _retry(given.output, given.codes, given.replicas, given.dtype),
        argv,
        left="what is mended stays; the same command goes on",
    )


def _retry(place: str, codes: str, replicas: int, dtype: str | None) -> int:
    # Imported here, where Ctrl-C is handled: Ray, torch and transformers take many seconds.
    from cluster.output.failed_rows import ErrorChoice
    from cluster.output.run_output import RunOutput
    from cluster.report.terminal import print_report
    from cluster.runs.run import run

    settings = RunOutput.open(place).require_manifest().identity.settings
    config = RunConfig.of_identity(settings, output=place, replicas=replicas)
    config = config if dtype is None else replace(config, dtype=dtype)
    outcome = run(config, console=open_console(stderr=True), retry=ErrorChoice.parse(codes))
    with report_shown(place):
        print_report(outcome.summary, note=outcome.note)
    return outcome.exit_code


if __name__ == "__main__":
    end_with(main)
