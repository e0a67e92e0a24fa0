"""The product's metrics, which Ray exports beside its own for Prometheus.

Names are those that dashboards for vLLM look for, behind `ray_sppruner_`; seconds, bytes and ratios
in base units; no label holds anything that grows with a corpus. Tests check dashboard and alerts
against `METRICS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal, TypeAlias

import ray

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]
PREFIX: Final = "sppruner_"
"""Of the names that Ray is given; it puts `ray_` in front."""
_LATENCIES: Final = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0
)  # fmt: skip
_REPLICA: Final = ("model", "replica")


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """One metric."""

    kind: Kind
    """A counter only grows, from the start of its process."""
    labels: tuple[str, ...]
    """Names of its labels."""
    description: str
    """What it counts or measures."""


METRICS: Final[Mapping[str, MetricDefinition]] = {
    # Of replicas.
    "num_requests_running": MetricDefinition(
        "gauge", _REPLICA, "Requests and rows that have a slot of the engine"
    ),
    "num_requests_waiting": MetricDefinition(
        "gauge", _REPLICA, "Requests and rows that wait for one, as far as they are at the replica"
    ),
    "kv_cache_usage_perc": MetricDefinition(
        "gauge", _REPLICA, "Share of the KV cache in use, from 0 to 1; absent without a bound"
    ),
    "engine_busy_seconds_total": MetricDefinition(
        "counter", _REPLICA, "Seconds in which the engine worked"
    ),
    "time_to_first_token_seconds": MetricDefinition(
        "histogram",
        (*_REPLICA, "priority"),
        "From the engine's receipt of a request to its first token; engines that say when",
    ),
    "e2e_request_latency_seconds": MetricDefinition(
        "histogram",
        (*_REPLICA, "priority"),
        "From a request's turn at a replica to its answer, decoding of images included",
    ),
    "request_success_total": MetricDefinition(
        "counter", (*_REPLICA, "priority", "finished_reason"), "Answers, retried rows included"
    ),
    "request_errors_total": MetricDefinition(
        "counter", (*_REPLICA, "priority", "code"), "Requests and rows that ended in an error"
    ),
    "prompt_tokens_total": MetricDefinition(
        "counter", (*_REPLICA, "priority"), "Prompt tokens that entered the decoder"
    ),
    "generation_tokens_total": MetricDefinition(
        "counter", (*_REPLICA, "priority"), "Generated tokens"
    ),
    "visual_tokens_total": MetricDefinition(
        "counter", (*_REPLICA, "priority", "state"), "Visual tokens before (input) and after (kept)"
    ),
    # Of runs: what is committed, so that a resumed run goes on where it was.
    "run_rows": MetricDefinition("gauge", ("run", "status"), "Rows planned, committed and failed"),
    "run_errors": MetricDefinition("gauge", ("run", "code"), "Committed error rows by code"),
    "run_visual_tokens": MetricDefinition(
        "gauge", ("run", "state"), "Visual tokens of committed rows, before and after pruning"
    ),
    "run_seconds": MetricDefinition(
        "gauge", ("run", "mode"), "Replica seconds: of rows, of measuring, of answers asked again"
    ),
    "run_saving_ratio": MetricDefinition(
        "gauge", ("run", "bound"), "Dense over pruned seconds, measured: ratio, low, high"
    ),
    "run_rows_per_second": MetricDefinition("gauge", ("run",), "Speed of the present attempt"),
}
"""Every metric by its name without prefix."""


class Metrics:
    """Records metrics with some labels given once. Outside Ray nothing is recorded."""

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._on = ray.is_initialized()

    def add(self, name: str, value: float, /, **labels: str) -> None:
        """To a counter."""
        if self._on and value > 0:
            _handle(name).inc(value, tags=self._labels | labels)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """A gauge."""
        if self._on:
            _handle(name).set(value, tags=self._labels | labels)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """One value of a histogram."""
        if self._on and value > 0:
            _handle(name).observe(value, tags=self._labels | labels)


@cache
def _handle(name: str) -> Any:
    """Ray's metric. One per process: it knows a name once."""
    from ray.util.metrics import Counter, Gauge, Histogram

    defined = METRICS[name]
    settings = {"description": defined.description, "tag_keys": defined.labels}
    if defined.kind == "histogram":
        return Histogram(PREFIX + name, boundaries=list(_LATENCIES), **settings)
    return (Counter if defined.kind == "counter" else Gauge)(PREFIX + name, **settings)
