"""Scores, intervals and pairing of the evaluation, on an engine whose mistakes are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sppruner.engine.types import Request, Result
from sppruner.evaluation import CAPTION, Item, Score, evaluate, held_out, majority, normalise, row
from sppruner.spec import DENSE, Budget, PruneSpec
from sppruner.tiny.scenes import HELD_OUT_SEED

HALF = PruneSpec(method="random", budget=Budget(ratio=0.5))
IMAGE = Image.new("RGB", (8, 8))


class Oracle:
    """Answers right except where `wrong` says otherwise; keeps half of ten tokens if pruned."""

    model_id = "oracle"
    model_revision = "1"
    image_backend = "pil"

    def __init__(self, items: list[Item], wrong: set[tuple[str, int]] = frozenset()) -> None:
        self._items = items
        self._wrong = wrong
        self.asked: list[Request] = []

    def warm_up(self) -> None:
        """Nothing to warm."""

    def run(self, requests: list[Request]) -> list[Result]:
        self.asked += requests
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Result:
        dense = request.spec.is_dense
        seed = int(request.spec.options.get("seed", 0))
        wrong = (request.id, seed) in self._wrong and not dense
        return Result(
            id=request.id,
            text="?" if wrong else f" {self._items[int(request.id)].answer.upper()}. ",
            visual_tokens=10,
            visual_tokens_kept=10 if dense else 5,
        )


def items(scenes: int = 20) -> list[Item]:
    kinds = ["shape", "colour", CAPTION]
    return [
        Item(scene=scene, kind=kind, prompt=f"{kind}?", answer=f"{kind} {scene}", image=IMAGE)
        for scene in range(scenes)
        for kind in kinds
    ]


def test_accuracy_leaves_captions_out_and_averages_over_seeds() -> None:
    asked = items()
    # Item 0 is wrong under one of two seeds, the caption (item 2) under both.
    engine = Oracle(asked, {("0", 1), ("2", 0), ("2", 1)})
    score = evaluate(engine, asked, HALF, seeds=(0, 1))
    assert score.n == 80
    assert score.accuracy == pytest.approx(1 - 0.5 / 40)
    assert score.by_type()[CAPTION] == pytest.approx(1 - 1 / 20)
    assert score.by_type()["colour"] == 1.0
    assert score.kept_share == 0.5


def test_a_method_against_itself_is_exactly_one_without_spread() -> None:
    asked = items()
    score = evaluate(Oracle(asked, {("0", 0), ("9", 0)}), asked, HALF)
    assert score.relative_to(score) == (1.0, 1.0, 1.0)
    low, high = score.interval()
    assert low < score.accuracy < high


def test_pairing_makes_a_constant_difference_certain() -> None:
    """Every scene loses one of its two questions: half of dense, on every resample of scenes."""
    asked = items()
    wrong = {(str(i), 0) for i, item in enumerate(asked) if item.kind == "shape"}
    dense = evaluate(Oracle(asked), asked, DENSE)
    half = evaluate(Oracle(asked, wrong), asked, HALF)
    relative = half.relative_to(dense)
    assert relative is not None
    assert relative == pytest.approx((0.5, 0.5, 0.5))


def test_a_share_of_nothing_is_not_reported() -> None:
    asked = items(3)
    nothing = Score(
        spec=DENSE, retained=1.0, items=asked, correct=np.zeros(len(asked)), kept_share=1.0
    )
    told = row("m", nothing, nothing)
    assert told["relative_to_dense"] is None
    assert {"model", "method", "retained", "n", "accuracy", "low", "high", "by_type"} <= set(told)


def test_a_row_that_fails_stops_the_evaluation() -> None:
    class Broken(Oracle):
        def _one(self, request: Request) -> Result:
            return Result(id=request.id, text=None, error_code="x", error_message="broken")

    with pytest.raises(RuntimeError, match="broken"):
        evaluate(Broken(items(1)), items(1), HALF)


def test_held_out_scenes_are_held_out_whole_and_enough() -> None:
    asked = held_out(50, first_scene=7)
    assert min(item.scene for item in asked) == HELD_OUT_SEED + 7
    assert sum(item.kind != CAPTION for item in asked) >= 50
    again = held_out(50, first_scene=7)
    assert [(i.prompt, i.answer) for i in asked] == [(i.prompt, i.answer) for i in again]
    assert set(majority(asked)) == {item.kind for item in asked}


def test_answers_are_compared_without_case_and_full_stop() -> None:
    assert normalise(" Top  Left. ") == "top left"
    assert normalise(None) == ""
