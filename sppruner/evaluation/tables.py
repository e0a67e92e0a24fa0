"""Result records as a Markdown table for people and as CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from sppruner.evaluation.records import method_label

Record: TypeAlias = Mapping[str, Any]


def method_of(record: Record) -> str:
    """The method of a record with its options, such as sppruner:kappa=0."""
    return method_label(record["method"], record["options"])


def percent(value: float | None) -> str:
    """A fraction as per cent with one decimal; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(low: float | None, high: float | None) -> str:
    return f"{percent(low)} – {percent(high)}"


def _except_dense(cell: Callable[[Record], str]) -> Callable[[Record], str]:
    """The cell, empty for dense: comparing it with itself says nothing."""
    return lambda record: "" if record["method"] == "none" else cell(record)


def _worst(record: Record) -> str:
    worst = record["worst_type"]
    return "" if worst is None else f"{worst['kind']} {percent(worst['relative'])}"


def _recall(record: Record) -> str:
    return "" if record["planted_recall"] is None else percent(record["planted_recall"]["any"])


COLUMNS: Mapping[str, Callable[[Record], str]] = {
    "model": lambda record: str(record["model"]),
    "method": method_of,
    "kept %": lambda record: percent(record["kept_share"]),
    "n": lambda record: str(record["n"]),
    "{metric} %": lambda record: percent(record["accuracy"]),
    "interval": lambda record: _interval(record["low"], record["high"]),
    "% of dense": lambda record: percent(record["relative_to_dense"]),
    "its interval": _except_dense(
        lambda record: _interval(record["relative_low"], record["relative_high"])
    ),
    "worst kind, % of dense": _except_dense(_worst),
    "over layers %": lambda record: percent(record["kept_layers"]),
    "same answer %": _except_dense(lambda record: percent(record["agreement"])),
    "first-token KL": _except_dense(lambda record: f"{record['first_token_kl']:.3f}"),
    "log-prob of dense answer": lambda record: f"{record['dense_logprob']:.3f}",
    "subject found %": _recall,
}
"""Column names, in which {metric} is replaced by the metric's name, and each cell's text."""
ACCURACY = tuple(COLUMNS)[1:9]
"""The columns of the accuracy table."""
FIDELITY = (*ACCURACY[:2], *tuple(COLUMNS)[9:])
"""The columns of the table that compares answers with dense."""


def markdown(records: Sequence[Record], unsupported: Sequence[Record]) -> str:
    """A GitHub table of the records, and one line for each unsupported spec."""
    header = [name.format(metric=records[0]["metric"]) for name in COLUMNS]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += [
        "| " + " | ".join(cell(record) for cell in COLUMNS.values()) + " |" for record in records
    ]
    if unsupported:
        lines.append("")
    lines += [
        f"- {spec['model']}, {spec['method']} at {percent(spec['retained'])} %: "
        f"cannot: {spec['reason']}"
        for spec in unsupported
    ]
    return "\n".join(lines) + "\n"


def comma_separated(records: Sequence[Record]) -> str:
    """One line per record; each nested value is a column of its own, named with a dot
    (by_type.count)."""
    flat = [_flat(record) for record in records]
    names = list(dict.fromkeys(name for record in flat for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(record: Record) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if name == "options":
            flat["options"] = method_of(record).removeprefix(record["method"]).removeprefix(":")
        elif isinstance(value, Mapping):
            flat.update({f"{name}.{key}": nested for key, nested in value.items()})
        else:
            flat[name] = value
    return flat
