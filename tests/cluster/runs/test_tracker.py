"""The tracker registers a run with the controller, again if that restarts, and records its end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from cluster.accounting.ledger import UnitLedger
from cluster.config import RunConfig
from cluster.controller import RunName, get_controller, report_event
from cluster.errors import ErrorShareExceeded, StoreError
from cluster.events import RunEvent
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.runs.planning import plan_run
from cluster.runs.tracker import RunTracker
from jobs.make_corpus import make_corpus
from sppruner.spec import DENSE


@pytest.fixture
def planned(tmp_path: Path) -> tuple[RunConfig, Manifest, RunOutput]:
    source, output = str(tmp_path / "in"), str(tmp_path / "out")
    make_corpus(kind="caption", rows=6, output=source)
    config = RunConfig(
        kind="caption", input=source, output=output, model="m", prompt="p", spec=DENSE, unit_rows=3
    )
    run_output = RunOutput.open(output)
    manifest = plan_run(config, run_output, model_revision="r", image_backend="pil")
    return config, manifest, run_output


def name(planned: tuple[RunConfig, Manifest, RunOutput]) -> RunName:
    return RunName(planned[1].run_id, planned[2].uri)


def state(planned: tuple[RunConfig, Manifest, RunOutput]) -> str:
    """The run's state as the controller has it, also while that restarts."""
    deadline = time.monotonic() + 60
    while True:
        try:
            known = ray.get(get_controller().progress.remote(name(planned)))
        except ray.exceptions.RayActorError:
            assert time.monotonic() < deadline, "no controller"
            time.sleep(0.2)
            continue
        assert known is not None
        return known.state


def test_a_run_registers_again_with_a_restarted_controller(
    local_ray: None, planned: tuple[RunConfig, Manifest, RunOutput]
) -> None:
    with RunTracker(*planned) as tracker:
        assert tracker.progress() is not None
        ray.kill(get_controller(), no_restart=False)
        deadline = time.monotonic() + 60
        while (known := tracker.progress()) is None:
            assert time.monotonic() < deadline, "the run did not register again"
            time.sleep(0.5)
        assert (known.run_id, known.rows_total) == (planned[1].run_id, 6)


def test_a_run_goes_on_where_no_controller_answers(
    local_ray: None, planned: tuple[RunConfig, Manifest, RunOutput]
) -> None:
    tracker = RunTracker(*planned)
    ray.kill(get_controller(), no_restart=True)
    with tracker:
        assert tracker.progress() is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "incomplete"),
        (KeyboardInterrupt(), "stopped"),
        (ErrorShareExceeded("too many"), "stopped"),
        (StoreError("gone"), "failed"),
        (ValueError("bug"), "failed"),
    ],
)
def test_the_controller_records_how_the_run_ended(
    local_ray: None,
    planned: tuple[RunConfig, Manifest, RunOutput],
    error: BaseException | None,
    expected: str,
) -> None:
    if error is None:
        with RunTracker(*planned):
            assert state(planned) == "running"
    else:
        with pytest.raises(type(error)), RunTracker(*planned):
            raise error
    assert state(planned) == expected


def test_the_end_of_a_run_that_failed_asks_the_store_nothing(
    local_ray: None,
    planned: tuple[RunConfig, Manifest, RunOutput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be what failed, and has ten minutes for every answer."""
    tracker = RunTracker(*planned).__enter__()
    monkeypatch.setattr(RunOutput, "committed_units", lambda _: 1 / 0)
    error = StoreError("gone")
    tracker.__exit__(StoreError, error, None)
    assert state(planned) == "failed"


def test_a_run_whose_units_are_all_committed_is_completed(
    local_ray: None, planned: tuple[RunConfig, Manifest, RunOutput]
) -> None:
    """Whatever reached the controller: what the store holds decides."""
    _, manifest, output = planned
    rows = pa.table({"key": ["a", "b", "c"]})
    with RunTracker(*planned):
        for unit in manifest.units:
            assert output.commit_unit(unit.unit_id, rows, UnitLedger(rows=3), writer="w")
    assert state(planned) == "completed"


def test_what_happened_in_the_attempt_is_known_once_it_ended(
    local_ray: None, planned: tuple[RunConfig, Manifest, RunOutput]
) -> None:
    with RunTracker(*planned) as tracker:
        report_event(name(planned), RunEvent.ROW_QUARANTINED)
        assert tracker.events == {}
    assert tracker.events == {"row_quarantined": 1}


def test_the_reason_to_stop_is_known_without_the_error_that_ended_the_workers(
    local_ray: None, planned: tuple[RunConfig, Manifest, RunOutput]
) -> None:
    config, manifest, output = planned
    strict = replace(config, max_error_share=0.0, error_share_after=1)
    with RunTracker(strict, manifest, output) as tracker:
        assert tracker.stop_error() is None
        ledger = UnitLedger(rows=3, failed={"image_missing": 1})
        unit = manifest.units[0].unit_id
        ray.get(get_controller().unit_committed.remote(name(planned), unit, ledger))
        assert "1 of the 3 rows" in str(tracker.stop_error())


def test_a_committed_unit_that_cannot_be_read_is_an_error_before_anything_is_labelled(
    local_ray: None, planned: tuple[RunConfig, Manifest, RunOutput]
) -> None:
    _, manifest, output = planned
    unit = f"{manifest.run_id}-{manifest.units[0].unit_id}.parquet"
    (Path(output.uri) / unit).write_bytes(b"damaged")
    with pytest.raises(StoreError, match="remove it and resume"), RunTracker(*planned):
        pass


def test_what_an_earlier_attempt_left_in_the_controller_does_not_stop_this_one(
    local_ray: None,
    planned: tuple[RunConfig, Manifest, RunOutput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, manifest, output = planned
    strict = replace(config, max_error_share=0.0, error_share_after=1)
    failed = UnitLedger(rows=3, failed={"image_missing": 3})
    with RunTracker(strict, manifest, output) as tracker:
        ray.get(get_controller().unit_committed.remote(name(planned), "u", failed))
        assert tracker.stop_error() is not None
    again = RunTracker(strict, manifest, output)
    with monkeypatch.context() as broken:
        broken.setattr(RunTracker, "_register", lambda *_: 1 / 0)  # the controller is slow, say
        again.__enter__()
    assert again.progress() is not None
    assert again.stop_error() is None
