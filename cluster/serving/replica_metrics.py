"""What one replica tells Prometheus."""

from __future__ import annotations

import os

from cluster.metrics import Metrics
from cluster.protocol import Priority
from sppruner.engine.interface import EngineLoad, Result


class ReplicaMetrics:
    """model: as the engine names it."""

    def __init__(self, model: str) -> None:
        # Of a folder the last part: a path says more of a machine than a label should.
        self._metrics = Metrics(model=os.path.basename(model.rstrip("/")), replica=str(os.getpid()))
        self._busy_seconds = 0.0

    def answered(self, result: Result, priority: Priority, *, seconds: float) -> None:
        """seconds: from its receipt to its answer."""
        metrics, of = self._metrics, {"priority": priority.name.lower()}
        if result.error_code is not None:
            metrics.add("request_errors_total", 1, code=result.error_code, **of)
            return
        metrics.add(
            "request_success_total", 1, finished_reason=result.finish_reason or "none", **of
        )
        metrics.add("prompt_tokens_total", result.prompt_tokens, **of)
        metrics.add("generation_tokens_total", result.completion_tokens, **of)
        metrics.add("visual_tokens_total", result.visual_tokens, state="input", **of)
        metrics.add("visual_tokens_total", result.visual_tokens_kept, state="kept", **of)
        metrics.observe("e2e_request_latency_seconds", seconds, **of)
        metrics.observe("time_to_first_token_seconds", result.first_token_seconds, **of)

    def now(self, load: EngineLoad, *, busy_seconds: float) -> None:
        """load: of the engine. busy_seconds: since its start."""
        self._metrics.set("num_requests_running", load.running)
        self._metrics.set("num_requests_waiting", load.waiting)
        if load.kv_usage is not None:
            self._metrics.set("kv_cache_usage_perc", load.kv_usage)
        self._metrics.add("engine_busy_seconds_total", busy_seconds - self._busy_seconds)
        self._busy_seconds = busy_seconds
