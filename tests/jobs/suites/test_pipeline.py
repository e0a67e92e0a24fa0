"""Suite `pipeline`: both sides do the same work with the same settings."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from cluster.corpus.parquet import index_parquet
from cluster.serving.application import FleetSettings, application
from cluster.serving.engine_settings import EngineSettings
from cluster.store import open_store
from jobs.suites.corpora import draw_captioned, draw_squares, write_corpus
from jobs.suites.labelling import count_replica_threads
from jobs.suites.pipeline import (
    Workload,
    build_model_workload,
    build_shape_workload,
    run_pipeline_suite,
    time_engine,
    use_torch_threads,
)
from jobs.suites.random_models import build, save
from jobs.suites.shapes import SHAPES, ModelShape, draw_scenes
from sppruner import DENSE, Budget, PruneSpec
from sppruner.engine import BatchEngine, ContinuousEngine, Engine, Request, SamplingParams
from sppruner.errors import EngineError
from sppruner.models.loading import load_model
from tests.cluster.fake_engine import FakeEngine
from tests.jobs.suites.test_engine import SMALL

SPEC = PruneSpec(method="sppruner", budget=Budget(ratio=0.222))
WORK = Workload(model="fake", images=10, unit_rows=4, batch_rows=2, new_tokens=3, side=32)


@pytest.mark.parametrize("shape", [*SMALL.values(), SHAPES["tiny"]], ids=lambda shape: shape.name)
def test_a_saved_model_answers_as_before_and_never_ends_early(
    shape: ModelShape, tmp_path: Path
) -> None:
    """The tiny model was trained to end after a few words."""
    loaded = build(shape)
    save(shape, tmp_path)
    reloaded = load_model(str(tmp_path))
    assert reloaded.model.dtype == loaded.model.dtype
    requests = [
        Request(
            id=f"{number}",
            prompt="describe the image.",
            images=(image,),
            spec=(DENSE, SPEC)[number % 2],
            generation=SamplingParams(max_new_tokens=40),
        )
        for number, image in enumerate(draw_scenes(shape, 2))
    ]
    expected = BatchEngine(loaded).run(requests)
    for engine in (BatchEngine(reloaded), ContinuousEngine(reloaded)):
        found = engine.run(requests)
        assert [one.completion_tokens for one in found] == [40, 40]
        assert [one.text for one in found] == [one.text for one in expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="replicas on a CPU only")
def test_the_bare_engine_has_the_threads_of_a_replica() -> None:
    built = application(FleetSettings(engine=EngineSettings(model="m")))
    (replica,) = [a for a in built._bound_deployment.init_args if hasattr(a, "_bound_deployment")]
    threads = count_replica_threads()
    assert replica._bound_deployment.init_kwargs["threads"] == threads
    built = application(FleetSettings(engine=EngineSettings(model="m"), threads=7))
    (replica,) = [a for a in built._bound_deployment.init_args if hasattr(a, "_bound_deployment")]
    assert replica._bound_deployment.init_kwargs["threads"] == 7
    before = torch.get_num_threads()
    with use_torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("shape", [None, *SHAPES.values()])
def test_a_job_has_several_units(shape: ModelShape | None, quick: bool) -> None:
    if shape is None:
        work = build_model_workload("m", quick=quick)
    else:
        work = build_shape_workload(shape, "m", quick=quick)
    assert work.images >= 3 * work.unit_rows
    assert work.images % work.unit_rows == 0


def test_a_corpus_has_images_of_the_shape_in_files_of_one_unit(tmp_path: Path) -> None:
    rows = draw_squares(5, seed=1, side=80)
    write_corpus(str(tmp_path), rows, 2)
    store = open_store(str(tmp_path))
    files = [index_parquet(store, info, unit_rows=2, unit_bytes=2**20) for info in store.list()]
    assert [[unit.row_count for unit in file.units] for file in files] == [[2], [2], [1]]
    for row in rows:
        with Image.open(io.BytesIO(row.image or b"")) as image:
            assert image.size == (80, 80)


@pytest.mark.parametrize(
    "draw", [draw_captioned, lambda count, seed: draw_squares(count, seed, 48)]
)
def test_corpora_of_two_rounds_share_no_image(draw: Any) -> None:
    images = [row.image for seed in (0, 1) for row in draw(6, seed)]
    assert len(set(images)) == 12
    assert [row.image for row in draw(6, 1)] == images[6:]


class RecordingEngine(FakeEngine):
    """Records the requests in flight at the start of each batch."""

    def __init__(self) -> None:
        super().__init__(model="fake", slots=2)
        self.held: list[int] = []

    def answer_batch(self, requests: list[Request]) -> list[Any]:
        self.held.append(self.in_flight)
        return super().answer_batch(requests)


def test_the_bare_engine_is_kept_full_and_answers_every_image_once() -> None:
    images = [row.image or b"" for row in draw_squares(10, 0, 32)]
    engine = RecordingEngine()
    timed = time_engine(engine, WORK, images, held=6)
    assert max(engine.held) <= 6
    assert engine.held[0] >= 4
    assert engine.in_flight == 0
    assert timed.images_per_second == pytest.approx(10 / timed.seconds)


def test_answers_that_end_early_are_not_timed() -> None:
    images = [row.image or b"" for row in draw_squares(2, 0, 32)]
    engine: Engine = RecordingEngine()
    with pytest.raises(EngineError, match="6 tokens instead of 8"):
        time_engine(engine, replace(WORK, new_tokens=8), images, held=6)
    time_engine(engine, replace(WORK, new_tokens=8, side=None), images, held=6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [None, SMALL["llava"]])
def test_job_and_engine_label_the_same_images_in_turns(
    serving: str, s3: str, shape: ModelShape | None
) -> None:
    small = None if shape is None else replace(shape, quick_images=4, rows=4)
    found = run_pipeline_suite(
        "tiny-llava", shape=small, quick=True, root=s3, console=Console(quiet=True)
    )
    assert found["suite"] == "pipeline"
    assert [case["case"] for case in found["cases"]] == ["engine", "job"]
    images = found["machine"]["images"]
    assert found["machine"]["torch_threads"] == count_replica_threads()
    for case in found["cases"]:
        assert case["images"] == images
        for figure in ("seconds", "images_per_second"):
            assert 0 < case[figure]["low"] <= case[figure]["value"] <= case[figure]["high"]
    _, job = found["cases"]
    assert 0 < job["replica_busy_share"]["value"] <= 1
    spread = found["ratios"]["ray_vs_engine"]
    assert 0 < spread["low"] <= spread["value"] <= spread["high"]
    # Both rounds and the warm-up, each on its own corpus.
    store = open_store(s3)
    corpora = {info.key.split("/")[0] for info in store.list() if info.key.startswith("corpus")}
    assert len(corpora) == found["machine"]["rounds"] + 1
