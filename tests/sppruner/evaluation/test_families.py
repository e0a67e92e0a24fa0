"""Every family can be evaluated and drawn: random tiny models with their own processors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sppruner.engine import BatchEngine, Request, SamplingParams
from sppruner.evaluation import Dataset, compare, drawn_scenes
from sppruner.evaluation.drawn_scenes import Outline
from sppruner.models.loading import LoadedModel, load_model
from sppruner.pictures.geometry import WHOLE, plane_boxes
from sppruner.pictures.overlay import counts_of, overlay, selections_of
from sppruner.prompts import build_inputs
from sppruner.pruner import Pruner
from sppruner.spec import Budget, PruneSpec
from tests.sppruner.families import FAMILIES
from tests.sppruner.families.folders import write_folder

HALF = PruneSpec(method="grid", budget=Budget(ratio=0.5))
CORNER: Outline = ((0.5, 0.5), (1.0, 0.5), (1.0, 1.0), (0.5, 1.0))


def wide() -> Image.Image:
    """Grey, with the lower right quarter white: it is cut to tiles where the family cuts."""
    image = Image.new("RGB", (40, 20), "gray")
    ImageDraw.Draw(image).rectangle((20, 10, 39, 19), fill="white")
    return image


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_folder(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    made = drawn_scenes(4)
    items = [replace(item, image=wide, subjects=(CORNER,)) for item in made.items[:4]]
    return replace(made, items=items, max_new_tokens=6)


def test_answers_are_the_engines_and_figures_are_in_range(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    done = compare(loaded, dataset, [HALF])
    assert not done.cannot
    (score,) = done.scores
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
        assert answer.found is not None
        assert 0 < answer.found[1] < 1


def test_all_of_a_subject_is_found_where_nothing_is_pruned(
    loaded: LoadedModel, dataset: Dataset
) -> None:
    everything = replace(HALF, budget=Budget(ratio=1.0))
    (score,) = compare(loaded, dataset, [everything]).scores
    assert all(answer.found == (1.0, 1.0) for answer in score.repeats[0])
    assert all(answer.first_kl == pytest.approx(0, abs=1e-3) for answer in score.repeats[0])


def test_what_is_kept_is_drawn(loaded: LoadedModel) -> None:
    pruner = Pruner(loaded.model, tokenizer=loaded.processor.tokenizer)
    selections = selections_of(pruner, loaded.processor, wide(), "what?", HALF)
    counts = counts_of(selections)
    assert counts["kept"] == sum(choice.count for _, choice in selections)
    assert counts["kept"] + counts["dropped"] == sum(plane.count for plane, _ in selections)
    assert overlay(wide(), selections, side=200).width >= 200


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (60, 20), (32, 32), (50, 30)])
def test_boxes_are_where_the_processor_cuts(loaded: LoadedModel, size: tuple[int, int]) -> None:
    """The mean colour of each tile's pixels is that of the image in its box: colours run from left
    to right in red and from top to bottom in green."""
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
    # Normalisation is linear, so means follow the middles of the boxes.
    for axis in range(2):
        if np.ptp(middles[:, axis]) > 0:
            assert np.corrcoef(means[:, axis], middles[:, axis])[0, 1] > 0.99
        else:
            assert np.ptp(means[:, axis]) < 0.1
