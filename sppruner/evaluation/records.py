"""A comparison as plain values: one record per score, differences between methods, failures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sppruner.evaluation.compare import Comparison
from sppruner.evaluation.score import SpecScore


def method_label(method: str, options: Mapping[str, object]) -> str:
    """A method with its options in the syntax of `--methods`: sppruner:kappa=0."""
    pairs = (
        f":{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options.items()
    )
    return method + "".join(pairs)


def result_record(model: str, score: SpecScore, dense: SpecScore) -> dict[str, Any]:
    """One row of the table and of `evaluate.py --json`.

    Shares and accuracies are fractions. retained: the requested budget; kept_share: tokens kept as
    the budget counts them; kept_layers: their mean share over the decoder's layers. agreement:
    share of answers equal to dense token by token. first_token_kl, dense_logprob: means of
    `Answer.first_kl` and `Answer.dense_logprob`; dense_logprob_dense: the latter of dense itself.
    planted_recall: means of `Answer.subject_recall` ("any": share of questions whose subjects all
    keep a token; "share": share of the subjects' tokens kept); None without outlines.
    """
    accuracy, relative = score.interval(), score.relative_to(dense)
    worst = score.worst_type(dense)
    found = score.mean(lambda a: None if a.subject_recall is None else a.subject_recall[0])
    shares = score.mean(lambda a: None if a.subject_recall is None else a.subject_recall[1])
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


def result_records(model: str, comparison: Comparison) -> list[dict[str, Any]]:
    """One record per score: dense first, then the specs in their order."""
    dense = comparison.dense
    return [result_record(model, score, dense) for score in [dense, *comparison.scores]]


def paired_differences(model: str, scores: Sequence[SpecScore]) -> list[dict[str, Any]]:
    """For every ordered pair of methods at one budget: the accuracy of the first minus that of the
    second, with its paired 95 % interval. An interval that contains 0 shows no difference."""
    pairs = []
    for first, second in itertools.permutations(scores, 2):
        if first.spec.budget != second.spec.budget:
            continue
        difference = first.difference_to(second)
        pairs.append(
            {
                "model": model,
                "retained": first.spec.budget.ratio,
                "method": method_label(first.spec.method, first.spec.options),
                "other": method_label(second.spec.method, second.spec.options),
                "difference": difference.value,
                "low": difference.low,
                "high": difference.high,
            }
        )
    return pairs


def unsupported_records(model: str, comparison: Comparison) -> list[dict[str, Any]]:
    """The specs that the model cannot run, with the reason."""
    return [
        {
            "model": model,
            "method": method_label(failed.spec.method, failed.spec.options),
            "retained": failed.spec.budget.ratio,
            "reason": failed.reason,
        }
        for failed in comparison.unsupported
    ]
