"""python -m tests.chaos --seeds A:B [--keep DIR]; see `tests/README.md`.

Exit codes: 0 no promise was broken, 1 some were, 2 usage.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.ground import Ground
from tests.chaos.run import Report, run_schedule
from tests.chaos.schedule import Schedule, draw_schedule


def main(argv: Sequence[str] | None = None) -> int:
    """Runs seeds, one line each, and the sum."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "--seeds", required=True, help="first:stop, as in 0:200, or some: 3,17,20:25"
    )
    parser.add_argument("--keep", type=Path, help="keep logs, requests and outputs here")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="multiplies the time after which a run is stuck"
    )
    parser.add_argument("--plan", action="store_true", help="print the schedules, run nothing")
    arguments = parser.parse_args(argv)
    try:
        seeds = parse_seeds(arguments.seeds)
    except ValueError:
        parser.error(f"--seeds {arguments.seeds}: write first:stop, such as 0:200")
    schedules = [draw_schedule(seed) for seed in seeds]
    if arguments.plan:
        for schedule in schedules:
            print(schedule.to_json())
        return 0
    # A timeout's SIGTERM ends this process as an error does: everything it started ends first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    reports: list[Report] = []
    try:
        with Ground() as ground:
            # Clusters of one shape after another: starting one takes longer than many a run.
            for schedule in sorted(schedules, key=_shape):
                report = run_schedule(
                    schedule, ground, keep=arguments.keep, patience=arguments.patience
                )
                reports.append(report)
                print(report.line(), flush=True)
    finally:
        code = conclude(reports)
    return code


def parse_seeds(text: str) -> list[int]:
    """The seeds that "3,20:25" names. Raises ValueError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, colon, stop = part.partition(":")
        seeds += range(int(first), int(stop) if colon else int(first) + 1)
    return seeds


def conclude(reports: Sequence[Report]) -> int:
    """Prints the sum; the exit code."""
    harms = Counter(harm for report in reports for harm in {f.harm for f in report.findings})
    planned = Counter(fault.kind for report in reports for fault in report.schedule.faults)
    missed = Counter(_kind(name) for report in reports for name in report.missed)
    idle = Counter(_kind(name) for report in reports for name in report.idle)
    without = missed + idle
    kinds = ", ".join(f"{kind} {n} of {planned[kind]}" for kind, n in sorted(without.items()))
    struck = planned.total() - without.total()
    print(f"{struck} of {planned.total()} planned faults met something; the others: {kinds or '-'}")
    print(
        f"{len(reports)} runs, {harms['lost']} lost, {harms['doubled']} doubled, "
        f"{harms['stuck']} stuck, {harms['wrong']} wrong"
    )
    failed = sorted(report.schedule.seed for report in reports if report.findings)
    if failed:
        print("replay one: python -m tests.chaos --seeds N:N+1 --keep out/chaos, N of", *failed)
    return 1 if failed else 0


def _kind(name: str) -> str:
    return name.partition("@")[0]


def _shape(schedule: Schedule) -> tuple[int, bool, int]:
    return schedule.nodes, schedule.attached, schedule.seed


if __name__ == "__main__":
    sys.exit(main())
