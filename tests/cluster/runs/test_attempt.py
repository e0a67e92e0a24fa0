"""What comes before an attempt starts. Whole attempts are tested in tests/integration."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data import DataContext
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from cluster.errors import (
    ErrorShareExceeded,
    FleetUnavailable,
    RunError,
    StoreError,
    Unexpected,
)
from cluster.runs.attempt import _set_up_ray_data, _wait_for_cpus, _write


@pytest.fixture
def crowded(local_ray: None) -> Iterator[Callable[[], None]]:
    """A cluster in which other work holds all but half a CPU; what ends that work."""
    others = []
    while (group := placement_group([{"CPU": 0.25}])).wait(1):
        others.append(group)
    for surplus in (group, others.pop(), others.pop()):
        remove_placement_group(surplus)

    def end() -> None:
        for group in others:
            remove_placement_group(group)
        others.clear()

    yield end
    end()


def test_a_run_that_has_to_wait_for_cpus_says_so_and_goes_on(
    crowded: Callable[[], None],
) -> None:
    console = Console(width=200)
    ended = threading.Timer(4.0, crowded)
    ended.start()
    with console.capture() as captured:
        _wait_for_cpus(console)
    assert captured.get().count("waits until other work ends") == 1
    ended.join()
    with console.capture() as captured:
        _wait_for_cpus(console)
    assert captured.get() == ""


def test_a_run_for_which_there_are_never_cpus_ends(crowded: Callable[[], None]) -> None:
    with pytest.raises(FleetUnavailable, match=r"needs 0\.25 and 0\.5 on a node .* fewer --rep"):
        _wait_for_cpus(Console(quiet=True), patience_seconds=1.0)
    crowded()
    assert all(g["state"] == "REMOVED" for g in ray.util.placement_group_table().values())


class Reads:
    """A pipeline of which a task failed."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def write_datasink(self, *_: object, **__: object) -> None:
        raise self._error


@pytest.mark.parametrize("raised", [pa.ArrowInvalid("no footer"), MemoryError("x"), OSError(5, "")])
@pytest.mark.parametrize("reason", [None, ErrorShareExceeded("too many")])
def test_whatever_a_task_raises_ends_the_run_as_a_run_error(
    raised: Exception, reason: ErrorShareExceeded | None
) -> None:
    tracker: Any = SimpleNamespace(stop_error=lambda: reason)
    for error in (raised, RayTaskError("f", "trace", raised).as_instanceof_cause()):
        pipeline: Any = Reads(error)
        sink: Any = None
        with pytest.raises(RunError) as ended:
            _write(pipeline, sink, tracker)
        assert type(ended.value) is (Unexpected if reason is None else ErrorShareExceeded)
        assert ended.value.__cause__ is error
        own: Any = Reads(RayTaskError("f", "trace", StoreError("gone")).as_instanceof_cause())
        with pytest.raises(StoreError, match=r"^gone$"):
            _write(own, sink, tracker)


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
