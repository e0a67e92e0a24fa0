"""Evaluates dense and every spec on the same items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sppruner.errors import SpprunerError
from sppruner.evaluation.answering import Answer, SpecEvaluator
from sppruner.evaluation.dataset import Dataset
from sppruner.evaluation.score import SpecScore
from sppruner.models.loading import LoadedModel
from sppruner.relevance import ClipText
from sppruner.spec import DENSE, PruneSpec

RANDOM_SEEDS = (0, 1, 2)
_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupportedSpec:
    """A spec that a model cannot run."""

    spec: PruneSpec
    """The spec."""
    reason: str
    """The message of the error that it raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The scores of dense and of every spec on the same items."""

    dense: SpecScore
    """The full model."""
    scores: list[SpecScore]
    """One per supported spec, in the order of the specs passed to `compare`."""
    unsupported: list[UnsupportedSpec]
    """Specs that the model cannot run; they have no score."""


def compare(
    loaded: LoadedModel,
    dataset: Dataset,
    specs: Sequence[PruneSpec],
    *,
    clip_text: ClipText | None = None,
    seeds: Sequence[int] = RANDOM_SEEDS,
    batch_size: int = _BATCH_SIZE,
    advance: Callable[[int], None] = lambda questions: None,
) -> Comparison:
    """Answers every item densely and under every spec; "random" once per seed unless the spec sets
    its own. A spec that the model cannot run is recorded with its reason; the others continue.

    advance: called with the number of answers since the last call, dense included.
    """
    evaluator = SpecEvaluator(loaded, max_new_tokens=dataset.max_new_tokens, clip_text=clip_text)
    variants = {spec: _seeded(spec, seeds) for spec in specs}
    unsupported: dict[PruneSpec, str] = {}
    for spec in variants:
        try:
            evaluator.check(spec)
        except SpprunerError as error:
            unsupported[spec] = str(error)
    dense_answers: dict[int, Answer] = {}
    answers: dict[PruneSpec, list[dict[int, Answer]]] = {
        spec: [{} for _ in seeded] for spec, seeded in variants.items()
    }
    for numbers in _batches(dataset, batch_size):
        batch = evaluator.build_batch([dataset.items[i] for i in numbers])
        dense, batch_answers = evaluator.answer_dense(batch)
        dense_answers.update(zip(numbers, batch_answers, strict=True))
        advance(len(numbers))
        for spec, seeded in variants.items():
            for variant, collected in zip(seeded, answers[spec], strict=True):
                if spec not in unsupported:
                    try:
                        batch_answers = evaluator.answer_pruned(batch, variant, dense)
                    except SpprunerError as error:
                        unsupported[spec] = str(error)
                    else:
                        collected.update(zip(numbers, batch_answers, strict=True))
                advance(len(numbers))
    ordered = range(len(dataset.items))
    return Comparison(
        dense=SpecScore(spec=DENSE, dataset=dataset, repeats=[[dense_answers[i] for i in ordered]]),
        scores=[
            SpecScore(
                spec=spec,
                dataset=dataset,
                repeats=[[repeat[i] for i in ordered] for repeat in answers[spec]],
            )
            for spec in variants
            if spec not in unsupported
        ],
        unsupported=[
            UnsupportedSpec(spec=spec, reason=reason) for spec, reason in unsupported.items()
        ],
    )


def count_answers(
    dataset: Dataset, specs: Sequence[PruneSpec], seeds: Sequence[int] = RANDOM_SEEDS
) -> int:
    """The total number of answers that `compare` reports to `advance`."""
    return len(dataset.items) * (1 + sum(len(_seeded(spec, seeds)) for spec in set(specs)))


def _seeded(spec: PruneSpec, seeds: Sequence[int]) -> list[PruneSpec]:
    if spec.method != "random" or "seed" in spec.options:
        return [spec]
    return [replace(spec, options={**spec.options, "seed": seed}) for seed in seeds]


def _batches(dataset: Dataset, batch_size: int) -> list[list[int]]:
    """Item numbers of each batch. Captions are long and answers short: in batches of their own, no
    answer waits for a caption. Questions about one image stay together, in the items' order."""
    order = sorted(range(len(dataset.items)), key=lambda i: dataset.items[i].separate)
    questions = dataset.question_count
    return [
        order[start : min(start + batch_size, stop)]
        for first, stop in ((0, questions), (questions, len(order)))
        for start in range(first, stop, batch_size)
    ]
