"""Writes dashboard.json for Grafana; `make dashboard` calls it.

Panels name metrics without their prefix; one that is not in `cluster.metrics.METRICS` is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from cluster.metrics import METRICS, PREFIX

EXPORTED: Final = f"ray_{PREFIX}"
"""In front of a metric's name where Prometheus has it."""
_NAMED: Final = re.compile(r"\b([a-z0-9_]+)\{")
_SUFFIX: Final = re.compile(r"_(bucket|count|sum)$")


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph. queries: PromQL by legend, in which `name{` is a metric of ours."""

    title: str
    unit: str
    queries: dict[str, str]
    description: str = ""


_MODEL, _RUN = 'model=~"$model"', 'run=~"$run"'


def _quantiles(histogram: str) -> dict[str, str]:
    rate = f"sum by (le, priority) (rate({histogram}_bucket{{{_MODEL}}}[1m]))"
    return {
        f"p{share * 100:.0f} {{{{priority}}}}": f"histogram_quantile({share}, {rate})"
        for share in (0.5, 0.95)
    }


PANELS: Final = (
    Panel(
        "Answers a second",
        "reqps",
        {"{{priority}}": f"sum by (priority) (rate(request_success_total{{{_MODEL}}}[1m]))"},
    ),
    Panel(
        "Errors a second by code",
        "reqps",
        {"{{code}}": f"sum by (code) (rate(request_errors_total{{{_MODEL}}}[1m]))"},
    ),
    Panel(
        "Time to first token",
        "s",
        _quantiles("time_to_first_token_seconds"),
        "From the engine's receipt; vLLM's engine does not say.",
    ),
    Panel(
        "Latency of answers",
        "s",
        _quantiles("e2e_request_latency_seconds"),
    ),
    Panel(
        "Running and waiting",
        "short",
        {
            "running": f"sum(num_requests_running{{{_MODEL}}})",
            "waiting": f"sum(num_requests_waiting{{{_MODEL}}})",
        },
    ),
    Panel(
        "KV cache in use",
        "percentunit",
        {"{{replica}}": f"kv_cache_usage_perc{{{_MODEL}}}"},
        "Absent where the cache has no bound, as on a CPU.",
    ),
    Panel(
        "Engine busy",
        "percentunit",
        {"{{replica}}": f"rate(engine_busy_seconds_total{{{_MODEL}}}[1m])"},
    ),
    Panel(
        "Tokens a second",
        "short",
        {
            "prompt": f"sum(rate(prompt_tokens_total{{{_MODEL}}}[1m]))",
            "generated": f"sum(rate(generation_tokens_total{{{_MODEL}}}[1m]))",
        },
    ),
    Panel(
        "Visual tokens kept",
        "percentunit",
        {
            "{{priority}}": "sum by (priority) "
            f'(rate(visual_tokens_total{{state="kept",{_MODEL}}}[5m])) / sum by (priority) '
            f'(rate(visual_tokens_total{{state="input",{_MODEL}}}[5m]))'
        },
    ),
    Panel(
        "Rows of runs",
        "short",
        {"{{run}} {{status}}": f"run_rows{{{_RUN}}}"},
        "Committed rows, so that a resumed run goes on where it was.",
    ),
    Panel(
        "Visual tokens kept by runs",
        "percentunit",
        {
            "{{run}}": f'run_visual_tokens{{state="kept",{_RUN}}} / ignoring (state) '
            f'run_visual_tokens{{state="input",{_RUN}}}'
        },
    ),
    Panel("Rows a second of runs", "short", {"{{run}}": f"run_rows_per_second{{{_RUN}}}"}),
    Panel("Error rows by code", "short", {"{{run}} {{code}}": f"run_errors{{{_RUN}}}"}),
    Panel(
        "Measured saving",
        "short",
        {"{{run}} {{bound}}": f"run_saving_ratio{{{_RUN}}}"},
        "Dense over pruned seconds of control blocks, with the ends of its 95 % interval.",
    ),
    Panel(
        "Replica seconds",
        "s",
        {"{{run}} {{mode}}": f"run_seconds{{{_RUN}}}"},
        "Of rows, of measuring, and of answers that were asked again.",
    ),
)


def exported(query: str) -> str:
    """The query with the names that Prometheus has. Raises KeyError for a metric that is none."""

    def name(found: re.Match[str]) -> str:
        stem = _SUFFIX.sub("", found[1])
        if stem not in METRICS and found[1] not in METRICS:
            raise KeyError(f"{found[1]} is no metric")
        return f"{EXPORTED}{found[1]}{{"

    return _NAMED.sub(name, query)


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": panel.title,
            "description": panel.description,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi"}},
            "targets": [
                {"refId": chr(ord("A") + i), "expr": exported(query), "legendFormat": legend}
                for i, (legend, query) in enumerate(panel.queries.items())
            ],
        }
        for number, panel in enumerate(PANELS)
    ]
    return {
        "uid": "sppruner",
        "title": "sppruner",
        "tags": ["sppruner"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("model", "num_requests_running"),
                _variable("run", "run_rows"),
            ]
        },
        "panels": panels,
    }


def _variable(label: str, metric: str) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values({EXPORTED}{metric}, {label})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
