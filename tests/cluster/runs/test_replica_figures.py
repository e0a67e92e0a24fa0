"""Replicas' counters before and after: shares, deaths, and what is not known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from cluster.errors import FleetUnavailable
from cluster.runs.replica_figures import busy_share, fleet_stats, with_deaths
from cluster.serving.fleet import Fleet, FleetStats, _sum_stats


def stats(**busy_and_uptime: tuple[float, float]) -> FleetStats:
    """Counters of replicas by the number in their name, which is the pid."""
    replicas = [
        SimpleNamespace(pid=name, rows=1, busy_seconds=busy, uptime_seconds=uptime)
        for name, (busy, uptime) in busy_and_uptime.items()
    ]
    return _sum_stats(cast(Any, replicas))


def test_the_busy_share_counts_replicas_that_joined_and_knows_nothing_of_replaced_ones() -> None:
    before = stats(a=(1.0, 10.0))
    assert busy_share(before, stats(a=(6.0, 20.0))) == 0.5
    assert busy_share(before, stats(a=(9.0, 20.0), b=(1.0, 10.0))) == 0.45
    assert busy_share(before, stats(b=(9.0, 20.0))) is None


def test_replicas_that_do_not_answer_cost_a_figure_and_not_the_run() -> None:
    class Gone:
        app = "app"

        def stats(self) -> None:
            raise FleetUnavailable("no replica answers")

    assert fleet_stats(cast(Fleet, Gone())) is None
    assert busy_share(None, stats(a=(1.0, 1.0))) is None
    assert busy_share(stats(a=(1.0, 1.0)), None) is None


def test_a_replica_that_was_replaced_between_calls_has_died() -> None:
    before = stats(a=(1.0, 1.0), b=(1.0, 1.0))
    assert with_deaths({}, before, stats(a=(2.0, 2.0), c=(1.0, 1.0))) == {"replica_died": 1}
    told = {"replica_died": 3, "call_resent": 4}
    assert with_deaths(told, before, stats(a=(2.0, 2.0), c=(1.0, 1.0))) == told


def test_a_replica_that_joined_or_was_taken_away_has_not_died() -> None:
    before = stats(a=(1.0, 1.0), b=(1.0, 1.0))
    assert with_deaths({}, before, stats(a=(2.0, 2.0))) == {}
    assert with_deaths({}, before, stats(a=(2.0, 2.0), b=(2.0, 2.0), c=(1.0, 1.0))) == {}
    assert with_deaths({}, None, before) == with_deaths({}, before, None) == {}
