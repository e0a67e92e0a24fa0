"""Warnings before an attempt starts. Whole attempts are tested in tests/integration."""

from __future__ import annotations

import pytest
import ray
from ray.data import DataContext
from rich.console import Console

from cluster.errors import FleetUnavailable
from cluster.runs.attempt import _set_up_ray_data, _wait_for_cpus


@pytest.mark.parametrize(("free", "warned"), [(0.75, True), (0.0, True), (0.85, False), (4, False)])
def test_a_run_that_has_to_wait_for_cpus_says_so(
    local_ray: None, free: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free} if free else {})
    console = Console(width=200)
    with console.capture() as captured:
        _wait_for_cpus(console, actors=1)  # the cluster has them after all
    assert ("waits until other work ends" in captured.get()) == warned


def test_a_run_for_which_there_are_never_cpus_ends(local_ray: None) -> None:
    with pytest.raises(FleetUnavailable, match=r"this run needs 10\.60 .* fewer --replicas"):
        _wait_for_cpus(Console(quiet=True), actors=40, patience_seconds=1.0)
    assert all(g["state"] == "REMOVED" for g in ray.util.placement_group_table().values())


def test_ray_data_sets_no_limit_to_the_time_that_a_unit_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own, half an hour without a whole unit, would end a healthy run on a slow machine, at the
    same place at every resume."""
    context = DataContext()
    assert context.execution_no_progress_timeout_s > 0, "it has one no more: remove this"
    monkeypatch.setattr(DataContext, "get_current", lambda: context)
    _set_up_ray_data()
    assert context.execution_no_progress_timeout_s == -1
    assert context.max_consecutive_actor_init_deaths > 0
