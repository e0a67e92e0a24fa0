"""A comparison as plain values: rows of the table, and methods against each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sppruner.evaluation.compare import Comparison
from sppruner.evaluation.score import Score


def label(method: str, options: Mapping[str, object]) -> str:
    """A method with its options as `--methods` takes them: sppruner:kappa=0."""
    pairs = (
        f":{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options.items()
    )
    return method + "".join(pairs)


def row(model: str, score: Score, dense: Score) -> dict[str, Any]:
    """One row of the table and of `evaluate.py --json`.

    Shares and accuracies are fractions. retained: the budget asked for; kept_share: tokens kept as
    the budget counts them; kept_layers: their mean share over the decoder's layers. agreement:
    share of answers equal to dense token by token. first_token_kl, dense_logprob: see `Answer`;
    dense_logprob_dense is what dense itself gives its answers. planted_recall: how often all that
    a question asks about kept a token, and what share of its tokens stayed; None without outlines.
    """
    accuracy, relative = score.interval(), score.relative_to(dense)
    worst = score.worst_type(dense)
    found = score.mean(lambda a: None if a.found is None else a.found[0])
    shares = score.mean(lambda a: None if a.found is None else a.found[1])
    ratio = score.spec.budget.ratio
    return {
        "model": model,
        "method": score.spec.method,
        "options": dict(score.spec.options),
        "retained": score.kept_share if ratio is None else ratio,
        "kept_share": score.kept_share,
        "kept_layers": score.mean(lambda a: a.kept_layers),
        "n": score.n,
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "relative_to_dense": None if relative is None else relative.value,
        "relative_low": None if relative is None else relative.low,
        "relative_high": None if relative is None else relative.high,
        "by_type": score.by_type(),
        "worst_type": None if worst is None else {"kind": worst[0], "relative": worst[1]},
        "metric": score.dataset.metric.name,
        "metrics": score.metrics(),
        "agreement": score.mean(lambda a: float(a.agrees)),
        "first_token_kl": score.mean(lambda a: a.first_kl),
        "dense_logprob": score.mean(lambda a: a.dense_logprob),
        "dense_logprob_dense": dense.mean(lambda a: a.dense_logprob),
        "planted_recall": None if found is None else {"any": found, "share": shares},
    }


def rows(model: str, comparison: Comparison) -> list[dict[str, Any]]:
    """Dense first, then every score in its order."""
    dense = comparison.dense
    return [row(model, score, dense) for score in [dense, *comparison.scores]]


def ahead_of(model: str, scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Every two methods at one budget: how much more accurate the first is, with its paired 95 %
    interval. One that holds 0 shows no difference."""
    pairs = []
    for first, second in itertools.permutations(scores, 2):
        if first.spec.budget != second.spec.budget:
            continue
        lead = first.ahead_of(second)
        pairs.append(
            {
                "model": model,
                "retained": first.spec.budget.ratio,
                "method": label(first.spec.method, first.spec.options),
                "other": label(second.spec.method, second.spec.options),
                "difference": lead.value,
                "low": lead.low,
                "high": lead.high,
            }
        )
    return pairs


def cannot(model: str, comparison: Comparison) -> list[dict[str, Any]]:
    """The specs this model could not run, with the reason."""
    return [
        {
            "model": model,
            "method": label(failed.spec.method, failed.spec.options),
            "retained": failed.spec.budget.ratio,
            "reason": failed.reason,
        }
        for failed in comparison.cannot
    ]
