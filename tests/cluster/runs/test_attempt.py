"""Warnings before an attempt starts. Whole attempts are tested in tests/integration."""

from __future__ import annotations

import pytest
import ray
from rich.console import Console

from cluster.runs.attempt import _warn_if_starved


@pytest.mark.parametrize(("free", "warned"), [(0.75, True), (0.0, True), (0.85, False), (4, False)])
def test_a_run_that_has_to_wait_for_cpus_warns(
    free: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free} if free else {})
    console = Console(width=200)
    with console.capture() as captured:
        _warn_if_starved(console, actors=1)
    assert ("waits until other work ends" in captured.get()) == warned
