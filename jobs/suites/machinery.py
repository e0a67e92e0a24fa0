"""Suite `machinery`: a batch job of a million rows whose engine costs nothing.

What is left is reading, dispatch, decoding, checks and commits, on one machine. Jobs of a 16th of
the rows to all of them follow each other on one replica. Columns of a case:

- seconds, planning_seconds: of labelling, its actors' start included; of planning before that.
- objects_written: units of the output, and what is beside them.
- driver_mib, labeller_mib, replica_mib, readers_mib: resident memory over the job, less the pages
  of Ray's object store that a process has looked at, which has a bound of its own; sampled once a
  second after the job's first tenth: median, smallest and largest. Readers are summed.
- driver_growth_mib, labeller_growth_mib: median of the last tenth less that of the second.

`exponent`: of seconds as a power of rows, fitted over the sizes; 1 is a flat cost per row. The
range is that of the exponents between neighbouring sizes.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console

from cluster.output.run_output import RunOutput
from cluster.runs.planning import plan_run
from cluster.runs.run import fleet_settings
from cluster.serving.fleet import open_fleet
from cluster.store import open_store
from jobs.suites.labelling import build_caption_config, run_job
from jobs.suites.result import describe_machine, fit_power, summarise_rounds
from sppruner.models.loading import resolve_model

ROWS: Final = 1_000_000
_PARTS: Final = (16, 8, 4, 2, 1)
_FILE_ROWS: Final = 10_000
_FILE_BYTES: Final = 2**28
_ENGINE: Final = "jobs.suites.null_engine:NullEngine"
_PROC: Final = Path("/proc")
_OWN: Final = ("RssAnon", "RssFile")
_KIB: Final = {kind: re.compile(rf"^{kind}:\s+(\d+) kB", re.MULTILINE) for kind in _OWN}
_ROLES: Final = {"labeller": "Labeller", "replica": "ServeReplica", "readers": "ReadUnits"}
"""Role: what the title of its Ray process holds."""

Samples = Sequence[Mapping[str, float]]
"""MiB by role, over time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineryCase:
    """One size; the module docstring defines the columns."""

    case: str
    rows: int
    units: int
    objects_written: int
    seconds: float
    rows_per_second: float
    planning_seconds: float
    driver_mib: dict[str, float] | None
    driver_growth_mib: float | None
    labeller_mib: dict[str, float] | None
    labeller_growth_mib: float | None
    replica_mib: dict[str, float] | None
    readers_mib: dict[str, float] | None


def run_machinery_suite(
    model: str,
    *,
    rows: int | None = None,
    image_bytes: int | None = None,
    quick: bool,
    root: str,
    console: Console,
) -> dict[str, Any]:
    """rows: of the largest job. image_bytes: size of an image; None for tiny ones. root: folder of
    corpora and labels. model: its processor and config are read, its weights are not. Raises
    RunErrors as `run` does."""
    rows = rows or (16_000 if quick else ROWS)
    machine = describe_machine()
    cases: list[MachineryCase] = []
    settings = build_caption_config(f"{root}/in", f"{root}/out", model, engine=_ENGINE)
    fleet = fleet_settings(settings, resolve_model(model).revision, {})
    # In a process of its own: what making a corpus leaves in memory is not the driver's.
    writing = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with open_fleet(fleet) as opened, writing as writer:
        for part in _PARTS:
            count = rows // part
            corpus, output = f"{root}/machinery-{part}", f"{root}/machinery-labels-{part}"
            writer.submit(write_rows, corpus, count, image_bytes).result()
            config = build_caption_config(corpus, output, model, engine=_ENGINE)
            started = time.perf_counter()
            manifest = plan_run(
                config,
                RunOutput.open(output),
                model_revision=opened.model_revision,
                image_backend=opened.image_backend,
            )
            planning = time.perf_counter() - started
            with MemoryWatch() as watch:
                _, attempt = run_job(config, console)
            case = _make_case(f"1/{part}", count, attempt.wall_seconds, planning, watch.samples)
            cases.append(
                MachineryCase(
                    units=len(manifest.units),
                    objects_written=len(open_store(output).list()),
                    **case,
                )
            )
            console.print(f"{count} rows: {case['rows_per_second']:.0f} rows/s", highlight=False)
    return {
        "suite": "machinery",
        "machine": machine | {"rows": rows, "image_bytes": image_bytes or "tiny"},
        "cases": [asdict(case) for case in cases],
        "ratios": {"exponent": fit_exponent([(case.rows, case.seconds) for case in cases])},
    }


def write_rows(uri: str, rows: int, image_bytes: int | None) -> None:
    """Parquet files of images, no two neighbours alike: 4 x 4 PNGs, or bitmaps of noise of about
    `image_bytes`."""
    store = open_store(uri)
    make = _tiny_image if image_bytes is None else partial(_noise, math.isqrt(image_bytes // 3))
    file_rows = min(_FILE_ROWS, max(1, _FILE_BYTES // (image_bytes or 1)))
    for first in range(0, rows, file_rows):
        numbers = range(first, min(rows, first + file_rows))
        table = pa.table({"key": [f"{n:09}" for n in numbers], "image": [*map(make, numbers)]})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=1_000, use_dictionary=False)
        store.put(f"{first:09}.parquet", buffer.getvalue())


def fit_exponent(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Of seconds as a power of rows; see the module docstring."""
    logs = [(math.log(rows), math.log(seconds)) for rows, seconds in points]
    between = [(s1 - s0) / (r1 - r0) for (r0, s0), (r1, s1) in pairwise(logs)]
    return {"value": fit_power(points), "low": min(between), "high": max(between)}


class MemoryWatch:
    """Samples the memory of this process and of Ray's by role, once a second, on Linux."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.samples: list[dict[str, float]] = []
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.samples.append(sample_memory())


def sample_memory() -> dict[str, float]:
    """MiB by role as of now; of several processes of a role the sum. Empty where there is no
    /proc."""
    sizes: dict[str, float] = {}
    if not _PROC.is_dir():
        return sizes
    for folder in _PROC.glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            status = (folder / "status").read_text()
            mib = sum(int(_KIB[kind].findall(status)[0]) for kind in _OWN) / 2**10
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        in_ray = title.startswith("ray::")
        roles = [role for role, part in _ROLES.items() if in_ray and part in title]
        if int(folder.name) == os.getpid():
            roles = ["driver"]
        for role in roles:
            sizes[role] = sizes.get(role, 0.0) + mib
    return sizes


def _make_case(
    case: str, rows: int, seconds: float, planning: float, samples: Samples
) -> dict[str, Any]:
    tenth = max(1, len(samples) // 10)
    steady = samples[tenth:]

    def over(role: str) -> dict[str, float] | None:
        known = [sample[role] for sample in steady if role in sample]
        return summarise_rounds(known) if known else None

    def growth(role: str) -> float | None:
        early = [sample[role] for sample in samples[tenth : 2 * tenth] if role in sample]
        late = [sample[role] for sample in samples[-tenth:] if role in sample]
        return median(late) - median(early) if early and late else None

    return {
        "case": case,
        "rows": rows,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "planning_seconds": planning,
        **{f"{role}_mib": over(role) for role in ("driver", *_ROLES)},
        **{f"{role}_growth_mib": growth(role) for role in ("driver", "labeller")},
    }


def _noise(side: int, number: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).bytes(3 * side * side)
    Image.frombytes("RGB", (side, side), noise).save(buffer, "BMP")
    return buffer.getvalue()


def _tiny_image(number: int) -> bytes:
    buffer = io.BytesIO()
    color = (number % 256, number // 256 % 256, number // 65_536 % 256)
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()
