"""Dashboard and alerts name metrics, and labels of them, that the product exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.metrics import METRICS
from infra.monitoring.dashboard import EXPORTED, dashboard, exported

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
_METRIC = re.compile(rf"{EXPORTED}(\w+)(\{{[^}}]*\}})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPED = re.compile(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)")


def expressions() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def stem(name: str) -> str:
    for suffix in ("_bucket", "_count", "_sum"):
        short = name.removesuffix(suffix)
        if short in METRICS and METRICS[short].kind == "histogram":
            return short
    return name


@pytest.mark.parametrize(("name", "expression"), list(expressions()))
def test_every_expression_names_metrics_and_labels_that_exist(name: str, expression: str) -> None:
    found = list(_METRIC.finditer(expression))
    assert found
    labels: set[str] = {"le"}
    for one in found:
        definition = METRICS[stem(one[1])]
        labels |= set(definition.labels)
        assert set(_LABEL.findall(one[2] or "")) <= set(definition.labels)
        rated = re.search(rf"(rate|increase)\(\s*{one[0].split('{')[0]}", expression)
        assert bool(rated) == (definition.kind != "gauge"), "a counter is read by its rate"
    for group in _GROUPED.findall(expression):
        assert {label.strip() for label in group.split(",")} <= labels


def test_the_dashboard_in_the_repository_is_the_one_that_is_built() -> None:
    assert json.loads((MONITORING / "dashboard.json").read_text()) == dashboard()


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(expression for _, expression in expressions())
    assert [name for name in METRICS if f"{EXPORTED}{name}" not in shown] == []


def test_a_panel_of_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(KeyError, match="no_such"):
        exported('rate(no_such{model="a"}[1m])')


def test_every_alert_says_what_to_do() -> None:
    groups: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.yaml").read_text())[
        "groups"
    ]
    for group in groups:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["action"]
            assert rule["labels"]["severity"] in ("warning", "critical")
