"""The job against the bare engine on the same images.

A corpus is labelled in turns: with the replica's engine alone in this process, fed from memory and
kept full, and with the job (S3 server, Ray Data, a Serve replica, commits). Both have the same
settings and as many threads; both answer some rows before any clock starts. Every round has images
of its own, and every other one begins with the job. With fewer threads than cores the others are
left to Ray, as a GPU leaves it all of them: else the job's own processes slow the model down.

What is labelled is a named model's captions, or answers of a fixed length by the random weights of
a shape: there the model takes nearly all of the time, as it does on a GPU.
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
from cluster.demo import Row
from cluster.images import decode_image
from cluster.protocol import rows_held
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings, default_slots
from cluster.serving.fleet import open_fleet
from jobs.suites.corpora import captioned, squares, write_corpus
from jobs.suites.labelling import SPEC, captions, carry_out, threads_of_one_replica
from jobs.suites.random_models import save
from jobs.suites.result import in_turn, known_ratio, machine, ratio
from jobs.suites.shapes import Shape
from sppruner.engine import Engine, Request, SamplingParams
from sppruner.errors import EngineError
from sppruner.models.loading import dtype_on, resolve_model
from sppruner.tiny.questions import CAPTION_PROMPT

_SIDES: Final = ("engine", "job")
_NEW_TOKENS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What either side does in a round. batch_rows: slots of the engine. side: pixels of the images
    of a shape, whose answers all have `new_tokens` tokens; None for a named model, whose answers
    end where it wants. dtype: of the model."""

    model: str
    images: int
    unit_rows: int
    batch_rows: int = 16
    new_tokens: int = 64
    side: int | None = None
    dtype: str = "auto"

    @property
    def generation(self) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.new_tokens)

    def draw(self, count: int, seed: int) -> list[Row]:
        return captioned(count, seed) if self.side is None else squares(count, seed, self.side)

    def check(self, answered: int, completion_tokens: int) -> None:
        """Raises EngineError where the seconds of so many answers would not be those of the work
        that was meant."""
        if self.side is not None and completion_tokens != answered * self.new_tokens:
            raise EngineError(
                f"{answered} answers have {completion_tokens} tokens instead of {self.new_tokens} "
                "each: use a model that cannot end early"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One side in one round. busy_share: of a job, the share of time in which an engine ran."""

    seconds: float
    images_per_second: float
    busy_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One side, over the rounds. replica_busy_share: see `cluster.output.summary.Attempt`."""

    case: str
    images: int
    seconds: dict[str, float]
    images_per_second: dict[str, float]
    replica_busy_share: dict[str, float] | None


def work_of_model(model: str, *, dtype: str = "auto", quick: bool) -> Work:
    rows, units = (64, 4) if quick else (256, 8)
    return Work(model=model, images=rows * units, unit_rows=rows, dtype=dtype)


def work_of_shape(shape: Shape, folder: str, *, dtype: str = "auto", quick: bool) -> Work:
    """folder: holds its model. A unit has as many images as a pass of suite `engine`; the engine as
    many slots as there, but no more than a job's replica. Ray's workers take seconds to start: with
    this many units, minutes are timed."""
    rows, units = (shape.quick_images, 3) if quick else (shape.images, 36)
    return Work(
        model=folder,
        images=rows * units,
        unit_rows=rows,
        batch_rows=min(shape.rows, default_slots(gpu=shape.needs_gpu)),
        new_tokens=_NEW_TOKENS,
        side=shape.side,
        dtype=dtype,
    )


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def engine_pass(engine: Engine, work: Work, images: Sequence[bytes], held: int) -> Pass:
    """The engine alone, kept full: decode and submit while fewer than `held` are in flight. Raises
    EngineError for an answer that failed or is not as long as it should be."""
    limits = MediaLimits()
    began = time.monotonic()
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
                    generation=work.generation,
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
    seconds = time.monotonic() - began
    work.check(len(images), tokens)
    return Pass(seconds=seconds, images_per_second=len(images) / seconds)


def job_pass(corpus: str, output: str, work: Work, told: Console) -> Pass:
    """The job on replicas that are up; its clock runs from the first read to the last commit.
    Raises EngineError as `engine_pass` does, RunErrors as jobs do."""
    config = captions(
        corpus,
        output,
        work.model,
        generation=work.generation,
        dtype=work.dtype,
        unit_rows=work.unit_rows,
        slots=work.batch_rows,
    )
    summary, attempt = carry_out(config, told)
    work.check(attempt.rows, summary.total.completion_tokens)
    return Pass(
        seconds=attempt.wall_seconds,
        images_per_second=attempt.rows_per_second,
        busy_share=attempt.replica_busy_share,
    )


def pipeline(
    model: str,
    *,
    shape: Shape | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    quick: bool,
    root: str,
    environment: Mapping[str, str] | None = None,
    told: Console,
) -> dict[str, Any]:
    """model: whose captions are timed if no shape is given. threads: of the model on a CPU, None
    for those that a replica gets. root: where corpora and labels go. environment: with which Ray's
    workers reach it. Raises UsageError as `build` does."""
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads or threads_of_one_replica()))
        about = machine()
        if shape is None:
            work = work_of_model(model, dtype=dtype, quick=quick)
        else:
            folder = stack.enter_context(TemporaryDirectory(prefix=f"{shape.name}-"))
            save(shape, Path(folder), dtype)
            work = work_of_shape(shape, folder, dtype=dtype, quick=quick)
        rounds = 2 if quick else 5
        passes = sides_in_turns(
            work,
            rounds=rounds,
            root=root,
            environment=environment or {},
            threads=threads,
            told=told,
        )
    speeds = {side: [one.images_per_second for one in passes[side]] for side in _SIDES}
    return {
        "suite": "pipeline",
        "machine": about
        | {
            "model": shape.name if shape else model,
            "dtype": dtype_on("cuda" if torch.cuda.is_available() else "cpu", dtype),
            "images": work.images,
            "unit_rows": work.unit_rows,
            "slots": work.batch_rows,
            "most_new_tokens": work.new_tokens,
            "rounds": rounds,
        },
        "cases": [asdict(_case(side, work, passes[side])) for side in _SIDES],
        "ratios": {
            "ray_vs_engine": ratio(
                [job / alone for alone, job in zip(speeds["engine"], speeds["job"], strict=True)]
            )
        },
    }


def sides_in_turns(
    work: Work,
    *,
    rounds: int,
    root: str,
    environment: Mapping[str, str],
    threads: int | None = None,
    told: Console,
) -> dict[str, list[Pass]]:
    """What was timed of each side, by round. Raises as the passes do."""
    served = EngineSettings(
        model=work.model,
        revision=resolve_model(work.model).revision,
        slots=work.batch_rows,
        dtype=work.dtype,
    )
    engine, held = served.build(), rows_held(work.batch_rows)
    passes: dict[str, list[Pass]] = {side: [] for side in _SIDES}
    with ExitStack() as stack:
        stack.callback(engine.close)
        fleet = FleetSettings(engine=served, threads=threads, environment=environment)
        stack.enter_context(open_fleet(fleet))
        for number in range(-1, rounds):
            uncounted = number < 0
            count = min(work.images, 2 * work.batch_rows) if uncounted else work.images
            rows = work.draw(count, seed=number + 1)
            corpus = f"{root}/corpus-{number + 1}"
            write_corpus(corpus, rows, work.unit_rows)
            told.print(f"round {number + 1} of {rounds}: {count} images", highlight=False)
            for side in in_turn(_SIDES, number):
                if side == "engine":
                    images = [row.image for row in rows if row.image is not None]
                    timed = engine_pass(engine, work, images, held)
                else:
                    timed = job_pass(corpus, f"{root}/labels-{number + 1}", work, told)
                if not uncounted:
                    passes[side].append(timed)
    return passes


def _case(side: str, work: Work, passes: Sequence[Pass]) -> Case:
    return Case(
        case=side,
        images=work.images,
        seconds=ratio([one.seconds for one in passes]),
        images_per_second=ratio([one.images_per_second for one in passes]),
        replica_busy_share=known_ratio([one.busy_share for one in passes]),
    )
