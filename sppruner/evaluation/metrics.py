"""Metrics of a dataset: one number per item, and figures that need the whole set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sppruner.evaluation.captions import CiderD, bleu4
from sppruner.vqa import score as vqa_score


class Metric(Protocol):
    """Scores answers against an item's reference answers."""

    name: str
    """As reported."""
    single_answer: bool
    """Whether an item has exactly one right answer."""

    def score(self, text: str, answers: Sequence[str]) -> float:
        """The score of one answer, given the item's reference answers."""
        ...

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        """Further figures of the whole set, by name."""
        ...


class ExactMatch:
    """1 if the answer equals the reference after light normalisation (`sppruner.vqa`), else 0."""

    name = "exact match"
    single_answer = True

    def score(self, text: str, answers: Sequence[str]) -> float:
        return vqa_score(text, answers[:1])

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        return {}


class SoftAccuracy:
    """VQAv2's agreement with ten annotators; see `sppruner.vqa`."""

    name = "VQA soft accuracy"
    single_answer = False

    def score(self, text: str, answers: Sequence[str]) -> float:
        return vqa_score(text, answers)

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        return {}


def parse_yes_no(text: str) -> str:
    """An answer to a POPE question: "no" if its first sentence contains "no" or "not", else "yes"
    (https://github.com/AoiDragon/POPE)."""
    words = text.split(".")[0].replace(",", "").lower().split()
    return "no" if {"no", "not"} & set(words) else "yes"


class YesNo:
    """POPE (Li et al., EMNLP 2023, arXiv 2305.10355): accuracy; F1 of "yes"; and the share of "yes"
    answers, which shows a model's bias."""

    name = "accuracy"
    single_answer = True

    def score(self, text: str, answers: Sequence[str]) -> float:
        return float(parse_yes_no(text) == answers[0])

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        predicted = [parse_yes_no(text) == "yes" for text in texts]
        true = [answer[0] == "yes" for answer in answers]
        hits = sum(p and t for p, t in zip(predicted, true, strict=True))
        return {
            "f1": 2 * hits / max(1, sum(predicted) + sum(true)),
            "precision": hits / max(1, sum(predicted)),
            "recall": hits / max(1, sum(true)),
            "yes_ratio": sum(predicted) / len(predicted),
        }


class Captioning:
    """CIDEr-D per caption, BLEU-4 over all captions. references: the captions of each image, from
    which the idf is computed."""

    name = "CIDEr-D"
    single_answer = False

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self._cider = CiderD(references)

    def score(self, text: str, answers: Sequence[str]) -> float:
        return self._cider.score(text, answers)

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"bleu4": bleu4(texts, answers)}
