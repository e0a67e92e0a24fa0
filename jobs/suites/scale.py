"""What a row costs in corpora of 1, 2, 4, 8 and 16 times as many rows: it should not grow.

Every corpus is labelled by the batch job on the same replica, which is up before any clock starts.
Rounds go through all sizes, every other one backwards, each with images of its own; a job before
them is not counted. Columns of a case:

- seconds: of the job, from its first read to its last commit; a start of its actors that takes the
  same few seconds at every size is in them.
- planning_seconds: listing the corpus, reading the footers of its files, cutting it into units and
  writing the manifest, before that.
- driver_peak_mib: the most memory that this process held from planning to summary; empty where
  the system does not tell (Linux does).
- objects_read, objects_written: of the corpus, and in the output.
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
from jobs.suites.corpora import captioned, write_corpus
from jobs.suites.labelling import captions, carry_out, threads_of_one_replica
from jobs.suites.result import in_turn, known_ratio, machine, ratio
from sppruner.models.loading import resolve_model

SIZES: Final = (1, 2, 4, 8, 16)
_UNITS: Final = 4  # of the smallest corpus: one unit would be all start and end
_PROCESS: Final = Path("/proc/self")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One job. peak_mib: None where it is not known."""

    rows: int
    seconds: float
    planning_seconds: float
    objects_read: int
    objects_written: int
    peak_mib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One size, over the rounds. See the module for what each column covers."""

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


def scale(
    model: str,
    *,
    base: int | None = None,
    rounds: int | None = None,
    quick: bool,
    root: str,
    environment: Mapping[str, str] | None = None,
    told: Console,
) -> dict[str, Any]:
    """base: rows of the smallest corpus. root: where corpora and labels go. environment: with which
    Ray's workers reach it. Raises RunErrors as jobs do."""
    about = machine() | {"torch_threads": threads_of_one_replica()}
    base = base or (64 if quick else 256)
    rounds = rounds or (2 if quick else 5)
    unit_rows = -(-base // _UNITS)
    served = EngineSettings(model=model, revision=resolve_model(model).revision)
    passes: dict[int, list[Pass]] = {size: [] for size in SIZES}
    with open_fleet(FleetSettings(engine=served, environment=environment or {})) as fleet:
        for number in range(-1, rounds):
            told.print(f"round {number + 1} of {rounds}", highlight=False)
            for size in in_turn(SIZES, number) if number >= 0 else SIZES[:1]:
                # Seeds 0, 1, 2, …: that of the job which does not count is the first.
                seed = 0 if number < 0 else 1 + number * len(SIZES) + SIZES.index(size)
                corpus, output = f"{root}/corpus-{seed}", f"{root}/labels-{seed}"
                write_corpus(corpus, captioned(base * size, seed), unit_rows)
                timed = job_pass(fleet, corpus, output, unit_rows, told)
                if number >= 0:
                    passes[size].append(timed)
    return {
        "suite": "scale",
        "machine": about
        | {"model": model, "base_rows": base, "unit_rows": unit_rows, "rounds": rounds},
        "cases": [asdict(_case(size, unit_rows, passes[size])) for size in SIZES],
        "ratios": growth(passes),
    }


def job_pass(fleet: Fleet, corpus: str, output: str, unit_rows: int, told: Console) -> Pass:
    """Plans the job and carries it out. Raises as `carry_out` does."""
    config = captions(corpus, output, fleet.model, unit_rows=unit_rows)
    resets = forget_peak()
    began = time.perf_counter()
    plan = plan_run(
        config,
        RunOutput.open(output),
        model_revision=fleet.model_revision,
        image_backend=fleet.image_backend,
    )
    planning = time.perf_counter() - began
    _, attempt = carry_out(config, told)  # goes by the plan that it finds
    peak = peak_mib() if resets else None
    assert attempt.rows == plan.rows
    return Pass(
        rows=plan.rows,
        seconds=attempt.wall_seconds,
        planning_seconds=planning,
        objects_read=len(open_store(corpus).list()),
        objects_written=len(open_store(output).list()),
        peak_mib=peak,
    )


def growth(passes: Mapping[int, Sequence[Pass]]) -> dict[str, dict[str, float]]:
    """What a row of the largest corpus costs, of what one of a smaller costs, round by round."""
    *_, second, last = SIZES
    first = SIZES[0]

    def paired(column: str, below: int) -> dict[str, float]:
        costs = [
            [getattr(one, column) / one.rows for one in passes[size]] for size in (last, below)
        ]
        return ratio([above / under for above, under in zip(*costs, strict=True)])

    return {
        f"seconds_per_row_{last}x_vs_{first}x": paired("seconds", first),
        # Here the start of a job counts for little.
        f"seconds_per_row_{last}x_vs_{second}x": paired("seconds", second),
        f"planning_seconds_per_row_{last}x_vs_{first}x": paired("planning_seconds", first),
    }


def forget_peak() -> bool:
    """`peak_mib` counts from here. False where the system does not let it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float:
    """The most memory that this process held since `forget_peak`."""
    status = (_PROCESS / "status").read_text()
    facts = dict(line.split(":", 1) for line in status.splitlines())
    return int(facts["VmHWM"].split()[0]) / 1024


def _case(size: int, unit_rows: int, passes: Sequence[Pass]) -> Case:
    one = passes[0]
    return Case(
        case=f"{size}x",
        rows=one.rows,
        units=-(-one.rows // unit_rows),
        objects_read=one.objects_read,
        objects_written=one.objects_written,
        seconds=ratio([one.seconds for one in passes]),
        rows_per_second=ratio([one.rows / one.seconds for one in passes]),
        seconds_per_row=ratio([one.seconds / one.rows for one in passes]),
        planning_seconds=ratio([one.planning_seconds for one in passes]),
        driver_peak_mib=known_ratio([one.peak_mib for one in passes]),
    )
