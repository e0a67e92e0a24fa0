"""How a dataset's answers are scored: one number per item, and figures that need the whole set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sppruner.evaluation.answers import plain, soft_accuracy, yes_or_no
from sppruner.evaluation.captions import CiderD, bleu4


class Metric(Protocol):
    """name: as reported. single_answer: whether an item has one right answer."""

    name: str
    single_answer: bool

    def score(self, text: str, answers: Sequence[str]) -> float:
        """What a text is worth, given the item's answers."""
        ...

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        """Further figures of the whole set, by name."""
        ...


class ExactMatch:
    """1 for the right answer but for case, spaces and a full stop."""

    name = "exact match"
    single_answer = True

    def score(self, text: str, answers: Sequence[str]) -> float:
        return float(plain(text) == plain(answers[0]))

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        return {}


class SoftAccuracy:
    """VQAv2's agreement with ten annotators; see `answers.soft_accuracy`."""

    name = "VQA soft accuracy"
    single_answer = False

    def score(self, text: str, answers: Sequence[str]) -> float:
        return soft_accuracy(text, answers)

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        return {}


class YesNo:
    """POPE (Li et al., EMNLP 2023, arXiv 2305.10355): accuracy, and F1 of "yes" with the share of
    "yes" that tells a model's bias."""

    name = "accuracy"
    single_answer = True

    def score(self, text: str, answers: Sequence[str]) -> float:
        return float(yes_or_no(text) == answers[0])

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        said = [yes_or_no(text) == "yes" for text in texts]
        true = [answer[0] == "yes" for answer in answers]
        both = sum(s and t for s, t in zip(said, true, strict=True))
        return {
            "f1": 2 * both / max(1, sum(said) + sum(true)),
            "precision": both / max(1, sum(said)),
            "recall": both / max(1, sum(true)),
            "yes_ratio": sum(said) / len(said),
        }


class Captioning:
    """CIDEr-D per caption, BLEU-4 over all. references: captions by image, for the idf."""

    name = "CIDEr-D"
    single_answer = False

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self._cider = CiderD(references)

    def score(self, text: str, answers: Sequence[str]) -> float:
        return self._cider.score(text, answers)

    def summary(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"bleu4": bleu4(texts, answers)}
