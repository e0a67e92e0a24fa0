"""Every family can be evaluated and drawn, on random tiny models with their own processors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sppruner.engine import BatchEngine, Request, SamplingParams
from sppruner.evaluation import Dataset, compare, drawn_scenes
from sppruner.evaluation.dataset import Outline
from sppruner.models.loading import LoadedModel, load_model
from sppruner.pictures.geometry import WHOLE, plane_boxes
from sppruner.pictures.overlay import count_kinds, overlay
from sppruner.pictures.selections import prepare_image
from sppruner.prompts import build_inputs
from sppruner.pruner import Pruner
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder

HALF = PruneSpec(method="grid", budget=Budget(ratio=0.5))
CORNER: Outline = ((0.5, 0.5), (1.0, 0.5), (1.0, 1.0), (0.5, 1.0))


def wide() -> Image.Image:
    """A grey image with a white lower right quarter; families that tile cut it into tiles."""
    image = Image.new("RGB", (40, 20), "gray")
    ImageDraw.Draw(image).rectangle((20, 10, 39, 19), fill="white")
    return image


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_folder(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    drawn = drawn_scenes(4)
    items = [replace(item, image=wide, subjects=(CORNER,)) for item in drawn.items[:4]]
    return replace(drawn, items=items, max_new_tokens=6)


def test_answers_equal_the_engine_s_and_figures_are_in_range(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    comparison = compare(loaded, dataset, [HALF])
    assert not comparison.unsupported
    (score,) = comparison.scores
    requests = [
        Request(
            id=item.id,
            prompt=item.prompt,
            images=(item.image(),),
            spec=HALF,
            generation=SamplingParams(max_new_tokens=6),
        )
        for item in dataset.items
    ]
    results = BatchEngine(loaded).run(requests)
    for answer, result in zip(score.repeats[0], results, strict=True):
        assert answer.text == result.text
        assert (answer.kept, answer.total) == (result.visual_tokens_kept, result.visual_tokens)
        assert answer.kept_layers == pytest.approx(answer.kept / answer.total)
        assert answer.first_kl >= 0
        assert answer.dense_logprob <= 0
        assert answer.subject_recall is not None
        assert 0 < answer.subject_recall[1] < 1


def test_subject_recall_is_one_without_pruning(loaded: LoadedModel, dataset: Dataset) -> None:
    everything = replace(HALF, budget=Budget(ratio=1.0))
    (score,) = compare(loaded, dataset, [everything]).scores
    assert all(answer.subject_recall == (1.0, 1.0) for answer in score.repeats[0])
    assert all(answer.first_kl == pytest.approx(0, abs=1e-3) for answer in score.repeats[0])


def test_the_kept_tokens_are_drawn(loaded: LoadedModel) -> None:
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    selections = prepare_image(pruner, loaded.processor, wide(), "what?", HALF).selections
    counts = count_kinds(selections)
    assert counts["kept"] == sum(choice.count for _, choice in selections)
    assert counts["kept"] + counts["dropped"] == sum(plane.count for plane, _ in selections)
    assert overlay(wide(), selections, side=200).width >= 200


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (60, 20), (32, 32), (50, 30)])
def test_boxes_match_the_processor_s_tiles(loaded: LoadedModel, size: tuple[int, int]) -> None:
    """The mean colour of each tile equals that of the image within its box: red increases from left
    to right and green from top to bottom."""
    columns, rows = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))
    inputs = build_inputs(loaded.processor, ["what?"], [image])
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    planes = [plane for plane, _ in pruner.prepare(inputs, HALF, ["what?"]).selections]
    if len(planes) <= 2:
        assert plane_boxes(planes, size) == [WHOLE] * len(planes)
        return
    tiles = inputs["pixel_values"].flatten(0, -4)
    means = tiles.mean(dim=(2, 3))[:, :2].numpy()
    boxes = np.array(plane_boxes(planes, size))
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    # Normalisation is linear, so the means are linear in the middles of the boxes.
    for axis in range(2):
        if np.ptp(middles[:, axis]) > 0:
            assert np.corrcoef(means[:, axis], middles[:, axis])[0, 1] > 0.99
        else:
            assert np.ptp(means[:, axis]) < 0.1
