"""Every spec on the same items, with dense beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sppruner.errors import SpprunerError
from sppruner.evaluation.answering import Answer, Asker
from sppruner.evaluation.dataset import Dataset
from sppruner.evaluation.score import Score
from sppruner.models.loading import LoadedModel
from sppruner.relevance import ClipText
from sppruner.spec import DENSE, PruneSpec

RANDOM_SEEDS = (0, 1, 2)
_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Cannot:
    """A spec that a model cannot run, and why."""

    spec: PruneSpec
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """dense and scores are on the same items; scores in the order of the specs asked for."""

    dense: Score
    scores: list[Score]
    cannot: list[Cannot]


def compare(
    loaded: LoadedModel,
    dataset: Dataset,
    specs: Sequence[PruneSpec],
    *,
    clip_text: ClipText | None = None,
    seeds: Sequence[int] = RANDOM_SEEDS,
    batch_rows: int = _ROWS,
    advance: Callable[[int], None] = lambda questions: None,
) -> Comparison:
    """Asks every item densely and under every spec; "random" once per seed unless the spec names
    one. A spec that the model cannot run is set down with its reason and the others go on.

    advance: called with the number of answers given since the last call, dense included.
    """
    asker = Asker(loaded, max_new_tokens=dataset.max_new_tokens, clip_text=clip_text)
    variants = {spec: _variants(spec, seeds) for spec in specs}
    cannot: dict[PruneSpec, str] = {}
    for spec in variants:
        try:
            asker.check(spec)
        except SpprunerError as error:
            cannot[spec] = str(error)
    dense_answers: dict[int, Answer] = {}
    answers: dict[PruneSpec, list[dict[int, Answer]]] = {
        spec: [{} for _ in tried] for spec, tried in variants.items()
    }
    for chunk in _chunks(dataset, batch_rows):
        batch = asker.batch([dataset.items[i] for i in chunk])
        dense, given = asker.dense(batch)
        dense_answers.update(zip(chunk, given, strict=True))
        advance(len(chunk))
        for spec, tried in variants.items():
            for variant, into in zip(tried, answers[spec], strict=True):
                if spec not in cannot:
                    try:
                        given = asker.pruned(batch, variant, dense)
                    except SpprunerError as error:
                        cannot[spec] = str(error)
                    else:
                        into.update(zip(chunk, given, strict=True))
                advance(len(chunk))
    ordered = range(len(dataset.items))
    return Comparison(
        dense=Score(spec=DENSE, dataset=dataset, repeats=[[dense_answers[i] for i in ordered]]),
        scores=[
            Score(
                spec=spec,
                dataset=dataset,
                repeats=[[repeat[i] for i in ordered] for repeat in answers[spec]],
            )
            for spec in variants
            if spec not in cannot
        ],
        cannot=[Cannot(spec=spec, reason=reason) for spec, reason in cannot.items()],
    )


def answers_due(
    dataset: Dataset, specs: Sequence[PruneSpec], seeds: Sequence[int] = RANDOM_SEEDS
) -> int:
    """How many answers `compare` will report to `advance`."""
    return len(dataset.items) * (1 + sum(len(_variants(spec, seeds)) for spec in set(specs)))


def _variants(spec: PruneSpec, seeds: Sequence[int]) -> list[PruneSpec]:
    if spec.method != "random" or "seed" in spec.options:
        return [spec]
    return [replace(spec, options={**spec.options, "seed": seed}) for seed in seeds]


def _chunks(dataset: Dataset, rows: int) -> list[list[int]]:
    """Item numbers batch by batch. Captions are long and answers short: batched apart, no answer
    waits for a caption. Prompts of one image stay together, in the items' order."""
    order = sorted(range(len(dataset.items)), key=lambda i: dataset.items[i].apart)
    asked = dataset.questions
    return [
        order[start : min(start + rows, stop)]
        for first, stop in ((0, asked), (asked, len(order)))
        for start in range(first, stop, rows)
    ]
