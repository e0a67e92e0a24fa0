"""Metrics under their names and labels, recorded where Ray runs and nowhere else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cluster import metrics
from cluster.metrics import METRICS, Metrics
from cluster.protocol import Priority
from cluster.serving.replica_metrics import ReplicaMetrics
from sppruner.engine.interface import EngineLoad, Result


class Recorded:
    """Handles that keep what they are given."""

    def __init__(self) -> None:
        self.values: dict[tuple[Any, ...], float] = {}

    def __call__(self, name: str) -> Any:
        recorded, definition = self.values, METRICS[name]

        class Handle:
            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert definition.kind == "counter"
                key = self.key(tags)
                recorded[key] = recorded.get(key, 0.0) + value

            def set(self, value: float, tags: dict[str, str]) -> None:
                assert definition.kind == "gauge"
                recorded[self.key(tags)] = value

            def observe(self, value: float, tags: dict[str, str]) -> None:
                assert definition.kind == "histogram"
                recorded[self.key(tags)] = value

            @staticmethod
            def key(tags: dict[str, str]) -> tuple[Any, ...]:
                assert set(tags) == set(definition.labels), name
                own = {k: v for k, v in tags.items() if k not in ("model", "replica")}
                return (name, *sorted(own.values()))

        return Handle()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], float]:
    handles = Recorded()
    monkeypatch.setattr(metrics, "_handle", handles)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    return handles.values


def test_names_and_labels_are_prometheus_own(recorded: dict[tuple[Any, ...], float]) -> None:
    for name, definition in METRICS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert name.endswith("_total") == (definition.kind == "counter")
        assert all(re.fullmatch(r"[a-z_]+", label) for label in definition.labels)
        assert definition.description


def test_a_replica_counts_answers_tokens_and_errors(
    recorded: dict[tuple[Any, ...], float],
) -> None:
    told = ReplicaMetrics("/models/of/mine/")
    answer = Result(
        id="a",
        text="x",
        finish_reason="stop",
        prompt_tokens=30,
        completion_tokens=2,
        visual_tokens=100,
        visual_tokens_kept=22,
        first_token_seconds=0.25,
    )
    told.answered(answer, Priority.ONLINE, seconds=0.5)
    told.answered(answer, Priority.ONLINE, seconds=0.5)
    failed = Result(id="b", text=None, error_code="prompt_invalid")
    told.answered(failed, Priority.BATCH, seconds=0.1)
    told.now(EngineLoad(running=3, waiting=1, kv_usage=0.5), busy_seconds=4.0)
    told.now(EngineLoad(running=2, waiting=0), busy_seconds=5.0)
    assert recorded == {
        ("request_success_total", "online", "stop"): 2,
        ("request_errors_total", "batch", "prompt_invalid"): 1,
        ("prompt_tokens_total", "online"): 60,
        ("generation_tokens_total", "online"): 4,
        ("visual_tokens_total", "input", "online"): 200,
        ("visual_tokens_total", "kept", "online"): 44,
        ("e2e_request_latency_seconds", "online"): 0.5,
        ("time_to_first_token_seconds", "online"): 0.25,
        ("num_requests_running",): 2,
        ("num_requests_waiting",): 0,
        ("kv_cache_usage_perc",): 0.5,
        ("engine_busy_seconds_total",): 5.0,
    }


def test_a_label_holds_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ReplicaMetrics("/models/of/mine/")._metrics._labels["model"] == "mine"
    assert ReplicaMetrics("llava-hf/llava-1.5-7b-hf")._metrics._labels["model"] == "llava-1.5-7b-hf"


def test_nothing_is_recorded_outside_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_handle", lambda name: pytest.fail(name))
    quiet = Metrics(model="m", replica="1")
    quiet.add("prompt_tokens_total", 1, priority="online")
    quiet.set("num_requests_running", 1)
    quiet.observe("e2e_request_latency_seconds", 1, priority="online")
