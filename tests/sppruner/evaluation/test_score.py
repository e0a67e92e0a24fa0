"""Scores, intervals and pairing on answers whose mistakes are known."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from PIL import Image

from sppruner.evaluation.answering import Answer
from sppruner.evaluation.dataset import Dataset, Item
from sppruner.evaluation.metrics import ExactMatch, YesNo
from sppruner.evaluation.records import ahead_of, row
from sppruner.evaluation.score import Score
from sppruner.spec import DENSE, Budget, PruneSpec

HALF = PruneSpec(method="grid", budget=Budget(ratio=0.5))
CAPTION = "caption"


def blank() -> Image.Image:
    return Image.new("RGB", (8, 8))


def dataset(scenes: int = 20) -> Dataset:
    items = [
        Item(
            id=f"{scene}-{kind}",
            group=str(scene),
            kind=kind,
            prompt=f"{kind}?",
            answers=(f"{kind} {scene}",),
            image=blank,
            apart=kind == CAPTION,
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


def score(asked: Dataset, *wrong_per_repeat: Collection[int], spec: PruneSpec = HALF) -> Score:
    """One repeat per collection of the items that are answered wrongly."""
    repeats = [
        [
            answer("?" if i in wrong else f" {item.answers[0].upper()}. ")
            for i, item in enumerate(asked.items)
        ]
        for wrong in wrong_per_repeat
    ]
    return Score(spec=spec, dataset=asked, repeats=repeats)


def test_accuracy_leaves_captions_out_and_averages_over_seeds() -> None:
    """Item 0 is wrong under one of two seeds, the caption (item 2) under both."""
    made = score(dataset(), {2}, {0, 2})
    assert made.n == 80
    assert made.accuracy == pytest.approx(1 - 0.5 / 40)
    assert made.by_type()[CAPTION] == pytest.approx(1 - 1 / 20)
    assert made.by_type()["colour"] == 1.0
    assert made.kept_share == 0.5


def test_a_method_against_itself_is_exactly_one_without_spread() -> None:
    made = score(dataset(), {0, 9})
    relative = made.relative_to(made)
    assert relative is not None
    assert (relative.value, relative.low, relative.high) == (1.0, 1.0, 1.0)
    own = made.interval()
    assert own.low < made.accuracy < own.high


def test_pairing_makes_a_constant_difference_certain() -> None:
    """Every scene loses one of its two questions: half of dense, on every resample of scenes."""
    asked = dataset()
    dense = score(asked, set(), spec=DENSE)
    half = score(asked, {i for i, item in enumerate(asked.items) if item.kind == "shape"})
    relative, lead = half.relative_to(dense), half.ahead_of(dense)
    assert relative is not None
    assert (relative.value, relative.low, relative.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (lead.value, lead.low, lead.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_intervals_resample_scenes_and_not_questions() -> None:
    """Two questions that are always both wrong or both right carry the information of one."""
    asked = dataset()
    together = {i for i, item in enumerate(asked.items) if int(item.group) < 10}
    alternating = {i for i, item in enumerate(asked.items) if item.kind == "shape"}
    spread = score(asked, together).interval()
    none = score(asked, alternating).interval()
    assert spread.high - spread.low > 0.3
    assert none.high == none.low == 0.5


def test_a_share_of_nothing_is_not_reported() -> None:
    asked = dataset(3)
    nothing = score(asked, set(range(len(asked.items))))
    told = row("m", nothing, nothing)
    assert told["relative_to_dense"] is None
    assert told["worst_type"] is None


def test_a_row_holds_what_is_documented() -> None:
    asked = dataset(4)
    wrong = {i for i, item in enumerate(asked.items) if item.kind == "shape"}
    told = row("m", score(asked, wrong), score(asked, set(), spec=DENSE))
    assert list(told)[:13] == [
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
    assert told["worst_type"] == {"kind": "shape", "relative": 0.0}
    assert told["retained"] == 0.5
    assert told["planted_recall"] is None


def test_figures_of_answers_are_means_over_those_that_have_them() -> None:
    asked = dataset(1)
    answers = [answer("a", found=(1.0, 0.5)), answer("b"), answer("c", found=(0.0, 0.0))]
    made = Score(spec=HALF, dataset=asked, repeats=[answers])
    told = row("m", made, made)
    assert told["planted_recall"] == {"any": 1.0, "share": 0.5}  # the caption is apart


def test_methods_are_compared_at_one_budget_only() -> None:
    asked = dataset(5)
    other = PruneSpec(method="topk", budget=Budget(ratio=0.5))
    elsewhere = PruneSpec(method="topk", budget=Budget(ratio=0.25))
    scores = [score(asked, {0}), score(asked, set(), spec=other)]
    pairs = ahead_of("m", [*scores, score(asked, set(), spec=elsewhere)])
    assert [(pair["method"], pair["other"]) for pair in pairs] == [
        ("grid", "topk"),
        ("topk", "grid"),
    ]
    assert pairs[0]["difference"] == pytest.approx(-0.1)
    assert pairs[0]["low"] == pytest.approx(-pairs[1]["high"])


def test_pope_reports_f1_and_the_share_of_yes() -> None:
    """Two of three answers say yes, one rightly: precision 1/2, recall 1."""
    told = YesNo().summary(["yes", "Yes.", "no"], [("yes",), ("no",), ("no",)])
    assert told == pytest.approx({"f1": 2 / 3, "precision": 0.5, "recall": 1.0, "yes_ratio": 2 / 3})


def test_the_majority_answer_is_what_guessing_would_score() -> None:
    asked = dataset(4)
    assert asked.majority() == {"shape": 0.25, "colour": 0.25, CAPTION: 0.25}
