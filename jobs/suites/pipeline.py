"""Suite `pipeline`: the batch job against the bare engine on the same images.

Each corpus is labelled twice in turn: by the replica's engine in this process, fed from memory and
kept full, and by the job (S3 server, Ray Data, a Serve replica, commits). Both sides have the same
settings and thread count, and both answer some rows before any clock starts. Every round has its
own images, and every second round starts with the job. With fewer threads than cores the remaining
cores are Ray's, as all cores are when the model runs on a GPU; otherwise the job's own processes
slow the model down.

Rows are captioned by a named model, or answered at a fixed length by the random weights of a shape:
there the model takes nearly all of the time, as it does on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from rich.console import Console

from cluster.config import MediaLimits
from cluster.demo import DrawnRow
from cluster.images import decode_image
from cluster.protocol import rows_held
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings, default_slots
from cluster.serving.fleet import open_fleet
from jobs.suites.corpora import draw_captioned, draw_squares, write_corpus
from jobs.suites.labelling import SPEC, build_caption_config, count_replica_threads, run_job
from jobs.suites.random_models import save
from jobs.suites.result import alternate, describe_machine, summarise_known_rounds, summarise_rounds
from jobs.suites.shapes import ModelShape
from sppruner.engine import Engine, Request, SamplingParams
from sppruner.errors import EngineError
from sppruner.models.loading import dtype_on, resolve_model
from sppruner.tiny.questions import CAPTION_PROMPT

_SIDES: Final = ("engine", "job")
_NEW_TOKENS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What either side does in a round."""

    model: str
    """Folder or Hub name."""
    images: int
    """Images of one round."""
    unit_rows: int
    """Rows per unit of the job."""
    batch_rows: int = 16
    """Slots of the engine."""
    new_tokens: int = 64
    """Most tokens of an answer; the exact number for a shape."""
    side: int | None = None
    """Side of a shape's square images in pixels; None for a named model, which ends its answers
    itself."""
    dtype: str = "auto"
    """Model precision, as in `load_model`."""

    @property
    def generation(self) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.new_tokens)

    def draw(self, count: int, seed: int) -> list[DrawnRow]:
        return (
            draw_captioned(count, seed)
            if self.side is None
            else draw_squares(count, seed, self.side)
        )

    def check(self, answered: int, completion_tokens: int) -> None:
        """Raises EngineError if a shape's answers do not have the fixed length: their time is no
        measurement."""
        if self.side is not None and completion_tokens != answered * self.new_tokens:
            raise EngineError(
                f"{answered} answers have {completion_tokens} tokens instead of {self.new_tokens} "
                "each: use a model that cannot end early"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SideTiming:
    """One side in one round."""

    seconds: float
    """Engine: submission to last answer. Job: first read to last commit."""
    images_per_second: float
    """Throughput over `seconds`."""
    busy_share: float | None = None
    """Share of the job's time in which a replica's engine ran; None for the bare engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCase:
    """One side over all rounds; `replica_busy_share` as in `cluster.output.summary.Attempt`."""

    case: str
    images: int
    seconds: dict[str, float]
    images_per_second: dict[str, float]
    replica_busy_share: dict[str, float] | None


def build_model_workload(model: str, *, dtype: str = "auto", quick: bool) -> Workload:
    rows, units = (64, 4) if quick else (256, 8)
    return Workload(model=model, images=rows * units, unit_rows=rows, dtype=dtype)


def build_shape_workload(
    shape: ModelShape, folder: str, *, dtype: str = "auto", quick: bool
) -> Workload:
    """folder: holds the shape's model. A unit has as many images as a pass of suite `engine`, and
    the engine as many slots as there, up to those of a job's replica. Ray's workers take seconds to
    start: with this many units the job runs for minutes."""
    rows, units = (shape.quick_images, 3) if quick else (shape.images, 36)
    return Workload(
        model=folder,
        images=rows * units,
        unit_rows=rows,
        batch_rows=min(shape.rows, default_slots(gpu=shape.needs_gpu)),
        new_tokens=_NEW_TOKENS,
        side=shape.side,
        dtype=dtype,
    )


@contextmanager
def use_torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_engine(
    engine: Engine, workload: Workload, images: Sequence[bytes], held: int
) -> SideTiming:
    """Times the bare engine, kept full: images are decoded and submitted while fewer than `held`
    are in flight. Raises EngineError if an answer failed or has not the fixed length."""
    limits = MediaLimits()
    started = time.monotonic()
    waiting = iter(enumerate(images))
    left, tokens = len(images), 0
    while left:
        for id, data in islice(waiting, max(0, held - engine.in_flight)):
            engine.submit(
                Request(
                    id=str(id),
                    prompt=CAPTION_PROMPT,
                    images=(decode_image(data, limits, engine.jpeg_scale),),
                    spec=SPEC,
                    generation=workload.generation,
                )
            )
        engine.step()
        for update in engine.poll():
            if update.result is None:
                continue
            if update.result.error_code is not None:
                raise EngineError(f"image {update.result.id}: {update.result.error_message}")
            left -= 1
            tokens += update.result.completion_tokens
    seconds = time.monotonic() - started
    workload.check(len(images), tokens)
    return SideTiming(seconds=seconds, images_per_second=len(images) / seconds)


def time_job(corpus: str, output: str, workload: Workload, console: Console) -> SideTiming:
    """Times the job on running replicas, from its first read to its last commit. Raises EngineError
    as `time_engine` does and RunErrors as `run` does."""
    config = build_caption_config(
        corpus,
        output,
        workload.model,
        generation=workload.generation,
        dtype=workload.dtype,
        unit_rows=workload.unit_rows,
        slots=workload.batch_rows,
    )
    summary, attempt = run_job(config, console)
    workload.check(attempt.rows, summary.total.completion_tokens)
    return SideTiming(
        seconds=attempt.wall_seconds,
        images_per_second=attempt.rows_per_second,
        busy_share=attempt.replica_busy_share,
    )


def run_pipeline_suite(
    model: str,
    *,
    shape: ModelShape | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    quick: bool,
    root: str,
    environment: Mapping[str, str] | None = None,
    console: Console,
) -> dict[str, Any]:
    """Runs the suite.

    model: labels captions if no shape is given. threads: model threads on a CPU; None: those of a
    replica. root: URI prefix of corpora and labels. environment: variables with which Ray's workers
    reach it. Raises UsageError as `build` does.
    """
    with ExitStack() as stack:
        stack.enter_context(use_torch_threads(threads or count_replica_threads()))
        machine = describe_machine()
        if shape is None:
            workload = build_model_workload(model, dtype=dtype, quick=quick)
        else:
            folder = stack.enter_context(TemporaryDirectory(prefix=f"{shape.name}-"))
            save(shape, Path(folder), dtype)
            workload = build_shape_workload(shape, folder, dtype=dtype, quick=quick)
        rounds = 2 if quick else 5
        timings = time_sides(
            workload,
            rounds=rounds,
            root=root,
            environment=environment or {},
            threads=threads,
            console=console,
        )
    speeds = {side: [one.images_per_second for one in timings[side]] for side in _SIDES}
    return {
        "suite": "pipeline",
        "machine": machine
        | {
            "model": shape.name if shape else model,
            "dtype": dtype_on("cuda" if torch.cuda.is_available() else "cpu", dtype),
            "images": workload.images,
            "unit_rows": workload.unit_rows,
            "slots": workload.batch_rows,
            "most_new_tokens": workload.new_tokens,
            "rounds": rounds,
        },
        "cases": [asdict(_make_case(side, workload, timings[side])) for side in _SIDES],
        "ratios": {
            "ray_vs_engine": summarise_rounds(
                [job / bare for bare, job in zip(speeds["engine"], speeds["job"], strict=True)]
            )
        },
    }


def time_sides(
    workload: Workload,
    *,
    rounds: int,
    root: str,
    environment: Mapping[str, str],
    threads: int | None = None,
    console: Console,
) -> dict[str, list[SideTiming]]:
    """Timings by side, one per round. Raises as `time_engine` and `time_job` do."""
    settings = EngineSettings(
        model=workload.model,
        revision=resolve_model(workload.model).revision,
        slots=workload.batch_rows,
        dtype=workload.dtype,
    )
    engine, held = settings.build(), rows_held(workload.batch_rows)
    timings: dict[str, list[SideTiming]] = {side: [] for side in _SIDES}
    with ExitStack() as stack:
        stack.callback(engine.close)
        fleet = FleetSettings(engine=settings, threads=threads, environment=environment)
        stack.enter_context(open_fleet(fleet))
        for number in range(-1, rounds):
            warmup = number < 0
            count = min(workload.images, 2 * workload.batch_rows) if warmup else workload.images
            rows = workload.draw(count, seed=number + 1)
            corpus = f"{root}/corpus-{number + 1}"
            write_corpus(corpus, rows, workload.unit_rows)
            console.print(f"round {number + 1} of {rounds}: {count} images", highlight=False)
            for side in alternate(_SIDES, number):
                if side == "engine":
                    images = [row.image for row in rows if row.image is not None]
                    timing = time_engine(engine, workload, images, held)
                else:
                    timing = time_job(corpus, f"{root}/labels-{number + 1}", workload, console)
                if not warmup:
                    timings[side].append(timing)
    return timings


def _make_case(side: str, workload: Workload, timings: Sequence[SideTiming]) -> PipelineCase:
    return PipelineCase(
        case=side,
        images=workload.images,
        seconds=summarise_rounds([one.seconds for one in timings]),
        images_per_second=summarise_rounds([one.images_per_second for one in timings]),
        replica_busy_share=summarise_known_rounds([one.busy_share for one in timings]),
    )
