"""The job against the bare engine on the same images.

One corpus is labelled in turns: with the replica's engine alone in this process, fed from memory,
and with the job (S3 server, Ray Data, a Serve replica, commits). Replicas are up before any clock
starts.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from cluster.config import MediaLimits, RunConfig
from cluster.fleet import FleetSettings, open_fleet
from cluster.local_s3 import LocalS3
from cluster.media import decode_image
from cluster.replica import EngineSettings
from cluster.run import run
from cluster.store import open_store
from jobs.make_corpus import make_corpus
from jobs.suites.result import machine, ratio
from sppruner import Budget, PruneSpec
from sppruner.engine import Engine, Generation, Request
from sppruner.engine.loading import resolve_model
from sppruner.tiny.questions import CAPTION_PROMPT

_SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))
_GENERATION = Generation(max_new_tokens=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One timed pass. replica_busy_share: of a job, the share of time in which an engine ran."""

    name: str
    round: int
    images: int
    seconds: float
    images_per_second: float
    replica_busy_share: float | None = None


def engine_pass(engine: Engine, images: Sequence[bytes], held: int, number: int) -> Case:
    """The engine alone, kept full: decode and submit while fewer than `held` are in flight."""
    limits = MediaLimits()
    began = time.monotonic()
    waiting = iter(enumerate(images))
    left = len(images)
    while left:
        for id, data in islice(waiting, max(0, held - engine.in_flight)):
            engine.submit(
                Request(
                    id=str(id),
                    prompt=CAPTION_PROMPT,
                    images=(decode_image(data, limits),),
                    spec=_SPEC,
                    generation=_GENERATION,
                )
            )
        engine.step()
        results = [update.result for update in engine.poll() if update.result is not None]
        assert not [result for result in results if result.error_code is not None]
        left -= len(results)
    seconds = time.monotonic() - began
    return Case(
        name="engine",
        round=number,
        images=len(images),
        seconds=seconds,
        images_per_second=len(images) / seconds,
    )


def job_pass(corpus: str, output: str, model: str, told: Console, number: int) -> Case:
    """The job on replicas that are up; its clock runs from the first read to the last commit."""
    config = RunConfig(
        kind="caption",
        input=corpus,
        output=output,
        model=model,
        prompt=CAPTION_PROMPT,
        spec=_SPEC,
        generation=_GENERATION,
        control_share=0.0,
    )
    attempt = run(config, console=told).summary.attempt
    assert attempt is not None
    return Case(
        name="job",
        round=number,
        images=attempt.rows,
        seconds=attempt.wall_seconds,
        images_per_second=attempt.rows_per_second,
        replica_busy_share=attempt.replica_busy_share,
    )


def pipeline(model: str, *, quick: bool, told: Console) -> dict[str, Any]:
    about = machine()
    rows, rounds = (256, 1) if quick else (2048, 3)
    served = EngineSettings(model=model, revision=resolve_model(model).revision)
    engine, held = served.build(), served.batch_rows_held
    cases: list[Case] = []
    with LocalS3("benchmark") as server:
        corpus = f"{server.uri}/corpus"
        make_corpus(kind="caption", rows=rows, output=corpus)
        store = open_store(corpus)
        images: list[bytes] = []
        for info in store.list(suffixes=(".parquet",)):
            column = pq.read_table(io.BytesIO(store.get(info.key)), columns=["image"])["image"]
            images += [value["bytes"] for value in column.to_pylist()]
        with open_fleet(FleetSettings(engine=served)):
            engine_pass(engine, images[: 2 * held], held, -1)  # warm-up, not counted
            for number in range(rounds):
                cases.append(engine_pass(engine, images, held, number))
                output = f"{server.uri}/labels-{number}"
                cases.append(job_pass(corpus, output, model, told, number))
    ratios = [
        job.images_per_second / alone.images_per_second
        for alone, job in zip(cases[::2], cases[1::2], strict=True)
    ]
    return {
        "suite": "pipeline",
        "machine": about,
        "cases": [asdict(case) for case in cases],
        "ratios": {"ray_vs_engine": ratio(ratios)},
    }
