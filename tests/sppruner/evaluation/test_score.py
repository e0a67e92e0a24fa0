"""Scores, intervals and pairing on answers with known mistakes."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from PIL import Image

from sppruner.evaluation.answering import Answer
from sppruner.evaluation.dataset import Dataset, Item
from sppruner.evaluation.metrics import ExactMatch, YesNo
from sppruner.evaluation.records import paired_differences, result_record
from sppruner.evaluation.score import SpecScore
from sppruner.spec import DENSE, Budget, PruneSpec

HALF = PruneSpec(method="grid", budget=Budget(ratio=0.5))
CAPTION = "caption"


def blank_image() -> Image.Image:
    return Image.new("RGB", (8, 8))


def dataset(scenes: int = 20) -> Dataset:
    items = [
        Item(
            id=f"{scene}-{kind}",
            group=str(scene),
            kind=kind,
            prompt=f"{kind}?",
            answers=(f"{kind} {scene}",),
            image=blank_image,
            separate=kind == CAPTION,
        )
        for scene in range(scenes)
        for kind in ("shape", "colour", CAPTION)
    ]
    return Dataset(name="made up", items=items, metric=ExactMatch())


def answer(text: str, **figures: object) -> Answer:
    settings: dict[str, object] = {
        "kept": 5,
        "total": 10,
        "kept_layers": 0.5,
        "agrees": True,
        "first_kl": 0.0,
        "dense_logprob": -0.1,
    }
    return Answer(text=text, **(settings | figures))  # type: ignore[arg-type]


def score(
    questions: Dataset, *wrong_per_repeat: Collection[int], spec: PruneSpec = HALF
) -> SpecScore:
    """One repeat per collection of wrongly answered item numbers."""
    repeats = [
        [
            answer("?" if i in wrong else f" {item.answers[0].upper()}. ")
            for i, item in enumerate(questions.items)
        ]
        for wrong in wrong_per_repeat
    ]
    return SpecScore(spec=spec, dataset=questions, repeats=repeats)


def test_accuracy_excludes_captions_and_averages_over_seeds() -> None:
    """Item 0 is wrong under one of two seeds, the caption (item 2) under both."""
    measured = score(dataset(), {2}, {0, 2})
    assert measured.n == 80
    assert measured.accuracy == pytest.approx(1 - 0.5 / 40)
    assert measured.by_type()[CAPTION] == pytest.approx(1 - 1 / 20)
    assert measured.by_type()["colour"] == 1.0
    assert measured.kept_share == 0.5


def test_a_score_relative_to_itself_is_exactly_one() -> None:
    measured = score(dataset(), {0, 9})
    relative = measured.relative_to(measured)
    assert relative is not None
    assert (relative.value, relative.low, relative.high) == (1.0, 1.0, 1.0)
    own = measured.interval()
    assert own.low < measured.accuracy < own.high


def test_a_constant_difference_has_a_paired_interval_of_width_zero() -> None:
    """Every scene loses one of its two questions: half of dense, on every resample of scenes."""
    questions = dataset()
    dense = score(questions, set(), spec=DENSE)
    half = score(questions, {i for i, item in enumerate(questions.items) if item.kind == "shape"})
    relative, difference = half.relative_to(dense), half.difference_to(dense)
    assert relative is not None
    assert (relative.value, relative.low, relative.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_intervals_resample_scenes_and_not_questions() -> None:
    """Two questions of a scene that are right or wrong together count as one observation."""
    questions = dataset()
    together = {i for i, item in enumerate(questions.items) if int(item.group) < 10}
    alternating = {i for i, item in enumerate(questions.items) if item.kind == "shape"}
    spread = score(questions, together).interval()
    none = score(questions, alternating).interval()
    assert spread.high - spread.low > 0.3
    assert none.high == none.low == 0.5


def test_no_share_is_reported_of_a_dense_accuracy_of_zero() -> None:
    questions = dataset(3)
    nothing = score(questions, set(range(len(questions.items))))
    record = result_record("m", nothing, nothing)
    assert record["relative_to_dense"] is None
    assert record["worst_type"] is None


def test_a_record_has_the_documented_keys() -> None:
    questions = dataset(4)
    wrong = {i for i, item in enumerate(questions.items) if item.kind == "shape"}
    record = result_record("m", score(questions, wrong), score(questions, set(), spec=DENSE))
    assert list(record)[:13] == [
        "model",
        "method",
        "options",
        "retained",
        "kept_share",
        "kept_layers",
        "n",
        "accuracy",
        "low",
        "high",
        "relative_to_dense",
        "relative_low",
        "relative_high",
    ]
    assert record["worst_type"] == {"kind": "shape", "relative": 0.0}
    assert record["retained"] == 0.5
    assert record["planted_recall"] is None


def test_figures_are_means_over_the_answers_that_have_them() -> None:
    questions = dataset(1)
    answers = [
        answer("a", subject_recall=(1.0, 0.5)),
        answer("b"),
        answer("c", subject_recall=(0.0, 0.0)),
    ]
    measured = SpecScore(spec=HALF, dataset=questions, repeats=[answers])
    record = result_record("m", measured, measured)
    assert record["planted_recall"] == {"any": 1.0, "share": 0.5}  # the caption is separate


def test_methods_are_compared_at_one_budget_only() -> None:
    questions = dataset(5)
    other = PruneSpec(method="topk", budget=Budget(ratio=0.5))
    elsewhere = PruneSpec(method="topk", budget=Budget(ratio=0.25))
    scores = [score(questions, {0}), score(questions, set(), spec=other)]
    pairs = paired_differences("m", [*scores, score(questions, set(), spec=elsewhere)])
    assert [(pair["method"], pair["other"]) for pair in pairs] == [
        ("grid", "topk"),
        ("topk", "grid"),
    ]
    assert pairs[0]["difference"] == pytest.approx(-0.1)
    assert pairs[0]["low"] == pytest.approx(-pairs[1]["high"])


def test_pope_reports_f1_and_the_share_of_yes() -> None:
    """Two of three answers are yes, one of them right: precision 1/2, recall 1."""
    record = YesNo().summary(["yes", "Yes.", "no"], [("yes",), ("no",), ("no",)])
    assert record == pytest.approx(
        {"f1": 2 / 3, "precision": 0.5, "recall": 1.0, "yes_ratio": 2 / 3}
    )


def test_the_majority_baseline_is_the_accuracy_of_the_most_frequent_answer() -> None:
    questions = dataset(4)
    assert questions.majority_baseline() == {"shape": 0.25, "colour": 0.25, CAPTION: 0.25}
