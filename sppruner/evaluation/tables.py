"""Rows as a Markdown table for people and as CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from sppruner.evaluation.records import label

Row: TypeAlias = Mapping[str, Any]


def written(row: Row) -> str:
    """The method of a row with its options."""
    return label(row["method"], row["options"])


def percent(value: float | None) -> str:
    """A fraction as per cent with one decimal; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(low: float | None, high: float | None) -> str:
    return f"{percent(low)} – {percent(high)}"


def _beside_dense(cell: Callable[[Row], str]) -> Callable[[Row], str]:
    """Empty for dense itself, which would be held against itself."""
    return lambda row: "" if row["method"] == "none" else cell(row)


def _worst(row: Row) -> str:
    worst = row["worst_type"]
    return "" if worst is None else f"{worst['kind']} {percent(worst['relative'])}"


def _recall(row: Row) -> str:
    return "" if row["planted_recall"] is None else percent(row["planted_recall"]["any"])


# Column names (a metric's name is filled in) and the text of each for a row.
COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "model": lambda row: str(row["model"]),
    "method": written,
    "kept %": lambda row: percent(row["kept_share"]),
    "n": lambda row: str(row["n"]),
    "{metric} %": lambda row: percent(row["accuracy"]),
    "interval": lambda row: _interval(row["low"], row["high"]),
    "% of dense": lambda row: percent(row["relative_to_dense"]),
    "its interval": _beside_dense(lambda row: _interval(row["relative_low"], row["relative_high"])),
    "worst kind, % of dense": _beside_dense(_worst),
    "over layers %": lambda row: percent(row["kept_layers"]),
    "same answer %": _beside_dense(lambda row: percent(row["agreement"])),
    "first-token KL": _beside_dense(lambda row: f"{row['first_token_kl']:.3f}"),
    "log-prob of dense answer": lambda row: f"{row['dense_logprob']:.3f}",
    "subject found %": _recall,
}
ACCURACY = tuple(COLUMNS)[1:9]
FIDELITY = (*ACCURACY[:2], *tuple(COLUMNS)[9:])


def markdown(rows: Sequence[Row], cannot: Sequence[Row]) -> str:
    """A GitHub table of the rows, and a line for each spec that could not be run."""
    head = [name.format(metric=rows[0]["metric"]) for name in COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in rows]
    if cannot:
        lines.append("")
    lines += [
        f"- {c['model']}, {c['method']} at {percent(c['retained'])} %: cannot: {c['reason']}"
        for c in cannot
    ]
    return "\n".join(lines) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """One line per row; nested values get a column each, named with a dot (by_type.count)."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "options":
            flat["options"] = written(row).removeprefix(row["method"]).removeprefix(":")
        elif isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": held for inner, held in value.items()})
        else:
            flat[name] = value
    return flat
