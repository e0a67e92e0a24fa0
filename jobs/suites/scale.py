"""Suite `scale`: cost of a row in corpora of 1, 2, 4, 8 and 16 times as many rows.

The cost should not grow. The batch job labels every corpus on the same replica, which is up before
any clock starts. Rounds visit all sizes, every second round in reverse order, each with its own
images; one job before the rounds is a warm-up. Columns of a case:

- seconds: duration of the job from its first read to its last commit, including the start of its
  actors, which takes the same few seconds at every size.
- planning_seconds: duration of planning before that: listing the corpus, reading file footers,
  cutting units and writing the manifest.
- driver_peak_mib: peak memory of this process from planning to summary; empty if the system does
  not report it (Linux does).
- objects_read, objects_written: objects in the corpus and in the output.

`exponent`: of seconds as a power of rows, fitted over the sizes of a round; 1 is a flat cost per
row, and the start of the actors makes it smaller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cluster.output.run_output import RunOutput
from cluster.runs.planning import plan_run
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from cluster.store import open_store
from jobs.suites.corpora import draw_captioned, write_corpus
from jobs.suites.labelling import build_caption_config, count_replica_threads, run_job
from jobs.suites.result import (
    alternate,
    describe_machine,
    fit_power,
    summarise_known_rounds,
    summarise_rounds,
)
from sppruner.models.loading import resolve_model

SIZES: Final = (1, 2, 4, 8, 16)
_UNITS: Final = 4  # in the smallest corpus: with one unit, start and stop would dominate
_PROCESS: Final = Path("/proc/self")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTiming:
    """One job of one size."""

    rows: int
    seconds: float
    planning_seconds: float
    objects_read: int
    objects_written: int
    peak_mib: float | None
    """Peak memory of the driver process in MiB; None if the system does not report it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleCase:
    """One size over all rounds; the module docstring defines the columns."""

    case: str
    rows: int
    units: int
    objects_read: int
    objects_written: int
    seconds: dict[str, float]
    rows_per_second: dict[str, float]
    seconds_per_row: dict[str, float]
    planning_seconds: dict[str, float]
    driver_peak_mib: dict[str, float] | None


def run_scale_suite(
    model: str,
    *,
    base_rows: int | None = None,
    rounds: int | None = None,
    quick: bool,
    root: str,
    environment: Mapping[str, str] | None = None,
    console: Console,
) -> dict[str, Any]:
    """base_rows: of the smallest corpus. root: URI prefix of corpora and labels. environment:
    variables with which Ray's workers reach it. Raises RunErrors as `run` does."""
    machine = describe_machine() | {"torch_threads": count_replica_threads()}
    base_rows = base_rows or (64 if quick else 256)
    rounds = rounds or (2 if quick else 5)
    unit_rows = -(-base_rows // _UNITS)
    served = EngineSettings(model=model, revision=resolve_model(model).revision)
    timings: dict[int, list[JobTiming]] = {size: [] for size in SIZES}
    with open_fleet(FleetSettings(engine=served, environment=environment or {})) as fleet:
        for number in range(-1, rounds):
            console.print(f"round {number + 1} of {rounds}", highlight=False)
            for size in alternate(SIZES, number) if number >= 0 else SIZES[:1]:
                # One seed per job: 0 is the warm-up's.
                seed = 0 if number < 0 else 1 + number * len(SIZES) + SIZES.index(size)
                corpus, output = f"{root}/corpus-{seed}", f"{root}/labels-{seed}"
                write_corpus(corpus, draw_captioned(base_rows * size, seed), unit_rows)
                timed = time_job(fleet, corpus, output, unit_rows, console)
                if number >= 0:
                    timings[size].append(timed)
    return {
        "suite": "scale",
        "machine": machine
        | {"model": model, "base_rows": base_rows, "unit_rows": unit_rows, "rounds": rounds},
        "cases": [asdict(_make_case(size, unit_rows, timings[size])) for size in SIZES],
        "ratios": compare_row_costs(timings),
    }


def time_job(fleet: Fleet, corpus: str, output: str, unit_rows: int, console: Console) -> JobTiming:
    """Plans and runs the job. Raises as `run_job` does."""
    config = build_caption_config(corpus, output, fleet.model, unit_rows=unit_rows)
    resets = reset_peak()
    started = time.perf_counter()
    manifest = plan_run(
        config,
        RunOutput.open(output),
        model_revision=fleet.model_revision,
        image_backend=fleet.image_backend,
    )
    planning = time.perf_counter() - started
    _, attempt = run_job(config, console)  # reuses the manifest that `plan_run` wrote
    peak = read_peak_mib() if resets else None
    assert attempt.rows == manifest.rows
    return JobTiming(
        rows=manifest.rows,
        seconds=attempt.wall_seconds,
        planning_seconds=planning,
        objects_read=len(open_store(corpus).list()),
        objects_written=len(open_store(output).list()),
        peak_mib=peak,
    )


def compare_row_costs(timings: Mapping[int, Sequence[JobTiming]]) -> dict[str, dict[str, float]]:
    """Seconds as a power of rows, and the cost of a row in the largest corpus relative to a smaller
    one, round by round."""
    *_, second, last = SIZES
    first = SIZES[0]

    def compare_rounds(column: str, below: int) -> dict[str, float]:
        costs = [
            [getattr(one, column) / one.rows for one in timings[size]] for size in (last, below)
        ]
        return summarise_rounds([above / under for above, under in zip(*costs, strict=True)])

    rounds = zip(*(timings[size] for size in SIZES), strict=True)
    return {
        "exponent": summarise_rounds(
            [fit_power([(one.rows, one.seconds) for one in of_a_round]) for of_a_round in rounds]
        ),
        f"seconds_per_row_{last}x_vs_{first}x": compare_rounds("seconds", first),
        # Both jobs are long: their start hardly counts.
        f"seconds_per_row_{last}x_vs_{second}x": compare_rounds("seconds", second),
        f"planning_seconds_per_row_{last}x_vs_{first}x": compare_rounds("planning_seconds", first),
    }


def reset_peak() -> bool:
    """Resets the peak of `read_peak_mib`. Returns False if the system does not allow it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def read_peak_mib() -> float:
    """Peak memory of this process since `reset_peak`, in MiB."""
    status = (_PROCESS / "status").read_text()
    facts = dict(line.split(":", 1) for line in status.splitlines())
    return int(facts["VmHWM"].split()[0]) / 1024


def _make_case(size: int, unit_rows: int, timings: Sequence[JobTiming]) -> ScaleCase:
    one = timings[0]
    return ScaleCase(
        case=f"{size}x",
        rows=one.rows,
        units=-(-one.rows // unit_rows),
        objects_read=one.objects_read,
        objects_written=one.objects_written,
        seconds=summarise_rounds([one.seconds for one in timings]),
        rows_per_second=summarise_rounds([one.rows / one.seconds for one in timings]),
        seconds_per_row=summarise_rounds([one.seconds / one.rows for one in timings]),
        planning_seconds=summarise_rounds([one.planning_seconds for one in timings]),
        driver_peak_mib=summarise_known_rounds([one.peak_mib for one in timings]),
    )
