"""The run controller: progress from reported commits, error shares, and the actor by name."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from cluster.accounting.control_plan import ControlPlan
from cluster.accounting.ledger import UnitLedger
from cluster.accounting.speedup import Block
from cluster.controller import (
    CONTROLLER_NAME,
    CONTROLLER_NAMESPACE,
    RunController,
    RunName,
    RunProgress,
    get_controller,
    report_commit,
    report_event,
)
from cluster.events import RunEvent
from tests.cluster.store.clock import FakeClock

UNIT = UnitLedger(
    rows=10,
    failed={"image_missing": 1},
    visual_tokens=900,
    visual_tokens_kept=200,
    nanoseconds=2_000_000_000,
    flops={"prefill": 5},
    flops_dense={"prefill": 9},
)


RUN = RunName("run", "s3://out")


def register(controller: RunController, name: RunName = RUN, **more: object) -> None:
    values: dict[str, object] = {
        "meta": {"output": "s3://out"},
        "units_total": 4,
        "rows_total": 40,
        "units_done": [],
        "ledger_so_far": UnitLedger(),
        "max_error_share": 0.2,
        "error_share_after": 10,
    }
    controller.register(name, **(values | more))  # type: ignore[arg-type]


def progress(controller: RunController) -> RunProgress:
    found = controller.progress(RUN)
    assert found is not None
    return found


def test_a_unit_counts_once_if_its_commit_is_reported_repeatedly() -> None:
    controller = RunController()
    register(controller)
    for _ in range(3):
        assert controller.unit_committed(RUN, "a", UNIT)

    now = progress(controller)
    assert (now.units_done, now.rows_done) == (1, 10)
    assert now.rows_failed == {"image_missing": 1}
    assert (now.visual_tokens, now.visual_tokens_kept) == (900, 200)
    assert (now.seconds, now.flops, now.flops_dense) == (2.0, 5, 9)


def test_rows_of_earlier_attempts_count_as_done_but_not_towards_the_speed() -> None:
    controller = RunController()
    register(controller, units_done=["a", "b"], ledger_so_far=UNIT + UNIT)

    resumed = progress(controller)
    assert (resumed.rows_done, resumed.units_done) == (20, 2)
    assert (resumed.rows_per_second, resumed.eta_seconds) == (0.0, None)

    controller.unit_committed(RUN, "a", UNIT)
    assert progress(controller).rows_done == 20

    controller.unit_committed(RUN, "c", UNIT)
    assert progress(controller).rows_per_second > 0
    assert progress(controller).eta_seconds is not None


def test_a_restarted_controller_is_rebuilt_by_registering_again() -> None:
    restarted = RunController()
    assert not restarted.unit_committed(RUN, "a", UNIT)
    assert restarted.progress(RUN) is None
    assert restarted.stop_reason(RUN) is None
    restarted.finish(RUN, "completed")

    register(restarted, units_done=["a"], ledger_so_far=UNIT)
    assert progress(restarted).rows_done == 10


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("cluster.controller.time.monotonic", clock.now)
    return clock


def test_events_are_counted_by_kind_and_start_anew_with_an_attempt(clock: FakeClock) -> None:
    controller = RunController()
    controller.event(RUN, "replica_died")
    register(controller)
    controller.event(RUN, "replica_died")
    controller.event(RUN, "replica_died")
    clock.time = 50.0
    controller.event(RUN, "store_waited", 40)
    ended = controller.finish(RUN, "completed")
    assert ended is not None
    assert ended.events == {"replica_died": 2, "store_waited": 40}

    register(controller)
    assert progress(controller).events == {}


@given(
    told=st.lists(st.tuples(st.floats(0, 50), st.integers(0, 100)), max_size=20),
)
def test_seconds_that_many_waited_at_the_same_time_are_counted_once(
    told: list[tuple[float, int]],
) -> None:
    """Whoever waited tells it when it is over, or now and then: the sum is of the union."""
    clock, controller = FakeClock(), RunController()
    with patch("cluster.controller.time.monotonic", clock.now):
        register(controller)
        waited = np.zeros(1_000 * 10, bool)  # tenths of a second
        for pause, seconds in told:
            clock.time += round(pause, 1)
            controller.event(RUN, "store_waited", seconds)
            end = round(clock.time * 10)
            waited[max(0, end - 10 * seconds) : end] = True
        counted = progress(controller).events.get("store_waited", 0)
    # An interval that begins before another's end counts from there: never more than the union.
    assert counted <= waited.sum() / 10 + 0.5
    if len(told) == 1:
        assert counted == pytest.approx(waited.sum() / 10, abs=0.5)


def test_actors_that_tell_of_the_same_wait_count_once(clock: FakeClock) -> None:
    controller = RunController()
    register(controller)
    for second in range(10, 101, 10):
        clock.time = float(second)
        controller.event(RUN, "replicas_waited", 10)
        clock.time += 1.0
        controller.event(RUN, "replicas_waited", 10)
    assert progress(controller).events == {"replicas_waited": 101}


def test_a_run_stops_for_the_error_rows_of_this_attempt_alone() -> None:
    bad = UnitLedger(rows=10, failed={"read_failed": 10})
    controller = RunController()
    register(controller, units_done=["a"], ledger_so_far=bad)
    controller.unit_committed(RUN, "a", bad)
    assert controller.stop_reason(RUN) is None

    controller.unit_committed(RUN, "b", bad)
    reason = controller.stop_reason(RUN)
    assert reason is not None
    assert "10 of the 10 rows" in reason

    register(controller, units_done=["a", "b"], ledger_so_far=bad + bad)
    assert controller.stop_reason(RUN) is None


def test_a_finished_run_keeps_its_state_and_speed() -> None:
    controller = RunController()
    register(controller)
    for unit in "abcd":
        controller.unit_committed(RUN, unit, UnitLedger(rows=10))
    assert progress(controller).state == "running"
    controller.finish(RUN, "completed")

    done = progress(controller)
    assert done.state == "completed"
    assert done.rows_per_second == progress(controller).rows_per_second
    assert [run.run_id for run in controller.runs()] == ["run"]


def test_completed_with_failed_rows_is_completed_with_errors() -> None:
    controller = RunController()
    register(controller, units_total=1)
    controller.unit_committed(RUN, "a", UNIT)
    controller.finish(RUN, "completed")
    assert progress(controller).state == "completed_with_errors"


def test_the_controller_is_one_actor_per_cluster_and_is_found_by_name(local_ray: None) -> None:
    controller = get_controller()
    try:
        assert get_controller() == controller
        ray.get(
            controller.register.remote(
                RUN,
                meta={},
                units_total=1,
                rows_total=10,
                units_done=[],
                ledger_so_far=UnitLedger(),
                max_error_share=1.0,
                error_share_after=1,
            )
        )
        report_commit(RUN, "a", UNIT)
        report_event(RUN, RunEvent.REPLICA_DIED, 2)
        known = ray.get(controller.progress.remote(RUN))
        assert known.rows_done == 10
        assert known.events == {"replica_died": 2}
    finally:
        ray.kill(controller)


def test_telling_a_controller_that_is_not_there_does_not_fail(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_commit(RUN, "a", UNIT)
    report_event(RUN, RunEvent.REPLICA_DIED)
    with monkeypatch.context() as broken:
        broken.setattr("cluster.controller.ray.get_actor", lambda *_, **__: 1 / 0)
        report_event(RUN, RunEvent.REPLICA_DIED)
    with pytest.raises(ValueError, match=CONTROLLER_NAME):
        ray.get_actor(CONTROLLER_NAME, namespace=CONTROLLER_NAMESPACE)


def test_asking_failed_rows_again_leaves_the_guard_of_a_running_job_on() -> None:
    controller = RunController()
    register(controller, rows_total=10_000)
    controller.unit_committed(RUN, "bad", UnitLedger(rows=600, failed={"x": 600}))
    assert controller.stop_reason(RUN) is not None
    register(controller, rows_total=600, max_error_share=1.0, again=["bad"])
    assert controller.stop_reason(RUN) is not None
    controller.finish(RUN, "completed")
    register(controller, rows_total=600, max_error_share=1.0, again=["bad"])
    assert controller.stop_reason(RUN) is None


def test_rows_that_fail_again_are_nothing_that_the_guard_of_a_running_job_counts() -> None:
    bad = UnitLedger(rows=600, failed={"x": 600})
    controller = RunController()
    register(controller, rows_total=10_000)
    register(controller, rows_total=10_000, max_error_share=1.0, again=["asked"])
    controller.unit_committed(RUN, "asked", bad)
    assert controller.stop_reason(RUN) is None
    assert progress(controller).rows_done == 600

    controller.unit_committed(RUN, "of the job", bad)
    assert controller.stop_reason(RUN) is not None


def test_commands_that_ask_failed_rows_again_do_not_end_the_job_beside_them() -> None:
    controller = RunController()
    register(controller, rows_total=10_000)
    for _ in range(2):  # the second must not take the first one's view for nobody's
        register(controller, rows_total=10_000, max_error_share=1.0, again=["asked"])
        ended = controller.finish(RUN, "completed", again=True)
        assert ended is not None
        assert progress(controller).state == "running"
    controller.unit_committed(RUN, "of the job", UnitLedger(rows=600, failed={"x": 600}))
    assert controller.stop_reason(RUN) is not None, "the job's guard"
    controller.finish(RUN, "stopped")
    assert progress(controller).state == "stopped"


def test_a_job_that_starts_beside_such_a_command_is_not_ended_by_it() -> None:
    controller = RunController()
    register(controller, rows_total=10_000, max_error_share=1.0, again=["asked"])
    register(controller, rows_total=10_000)
    controller.finish(RUN, "completed", again=True)
    assert progress(controller).state == "running"
    controller.unit_committed(RUN, "of the job", UnitLedger(rows=600, failed={"x": 600}))
    assert controller.stop_reason(RUN) is not None


def test_what_happened_in_a_job_is_kept_while_failed_rows_are_asked_again(
    clock: FakeClock,
) -> None:
    controller = RunController()
    register(controller)
    controller.unit_committed(RUN, "a", UNIT)
    controller.event(RUN, "replica_died", 1, "r1")
    clock.time = 20.0
    before = progress(controller)
    register(controller, units_done=[], again=["a"])
    controller.event(RUN, "replica_died", 1, "r1")
    controller.unit_committed(RUN, "a", UNIT)
    now = progress(controller)
    assert now.events == before.events == {"replica_died": 1}
    assert now.rows_per_second == before.rows_per_second > 0


def test_a_command_that_asks_failed_rows_again_alone_ends_its_view() -> None:
    """Also behind one of its kind that was killed."""
    controller = RunController()
    for _ in range(2):
        register(controller, again=["asked"])
    controller.finish(RUN, "failed", again=True)
    assert progress(controller).state == "failed"


def test_one_run_in_two_outputs_is_two_views() -> None:
    """Equal settings have equal run ids, wherever the rows go."""
    bad = UnitLedger(rows=10, failed={"x": 10})
    controller, other = RunController(), RunName("run", "s3://elsewhere")
    register(controller)
    register(controller, other)
    controller.unit_committed(RUN, "a", bad)
    assert controller.stop_reason(RUN) is not None
    assert controller.stop_reason(other) is None
    assert [run.rows_done for run in controller.runs()] == [10, 0]


def test_a_job_that_starts_again_brings_its_own_guard() -> None:
    """Also where the one before was killed, so that nobody ended its view."""
    controller = RunController()
    register(controller, rows_total=10_000)
    controller.unit_committed(RUN, "bad", UnitLedger(rows=600, failed={"x": 600}))
    assert controller.stop_reason(RUN) is not None
    register(controller, rows_total=10_000, max_error_share=1.0)
    assert controller.stop_reason(RUN) is None


def test_a_death_that_several_actors_tell_of_counts_once() -> None:
    controller = RunController()
    register(controller)
    for replica in ("a", "b", "a"):
        controller.event(RUN, "replica_died", 1, replica)
    controller.event(RUN, "call_resent", 1)
    controller.event(RUN, "call_resent", 1)
    assert progress(controller).events == {"replica_died": 2, "call_resent": 2}


def test_the_controller_keeps_running_runs_and_the_latest_that_ended() -> None:
    controller = RunController()
    for number in range(300):
        name = RunName(f"r{number}", "s3://out")
        controller.register(
            name, meta={}, units_total=1, rows_total=1, units_done=[],
            ledger_so_far=UnitLedger(), max_error_share=0.2, error_share_after=10,
        )  # fmt: skip
        if number:
            controller.finish(name, "completed")
    kept = [run.run_id for run in controller.runs()]
    assert kept == ["r0", *(f"r{n}" for n in range(199, 300))]


def test_a_job_goes_on_measuring_beside_a_command_that_asks_failed_rows_again() -> None:
    controller = RunController()
    units = [(f"unit {number}", 40) for number in range(8)]
    plan = ControlPlan.of("run", units, slots=4, asked=2)
    nothing = ControlPlan.of("run", units, slots=4, asked=0)
    first, second, _ = list(plan.ranks)[:3]
    register(controller, control=plan)
    controller.unit_committed(RUN, first, UnitLedger(rows=40, blocks=(Block(1, 2, 16),)))
    register(controller, again=["asked"], control=nothing)
    assert controller.may_measure(RUN, second)


def test_the_controller_allows_blocks_of_its_run_s_plan_alone_and_again_when_asked_again() -> None:
    """A call may be sent twice, and a block that was allowed is measured wherever it is retried."""
    controller = RunController()
    units = [(f"unit {number}", 40) for number in range(8)]
    plan = ControlPlan.of("run", units, slots=4, asked=2)
    first, second, third = list(plan.ranks)[:3]
    assert not controller.may_measure(RUN, first), "an unknown run's"
    register(controller)
    assert not controller.may_measure(RUN, first), "of a run that measures nothing"
    register(controller, control=plan)
    allowed = [controller.may_measure(RUN, name) for name in (first, first, second, third, "x")]
    assert allowed == [True, True, True, False, False]
    controller.unit_committed(RUN, first, UNIT)
    assert not controller.may_measure(RUN, first), "its unit is committed"
    spoiled = UnitLedger(rows=10, blocks_spoiled=1)
    controller.unit_committed(RUN, second, spoiled)
    assert controller.may_measure(RUN, third), "in place of the spoiled one"


def test_what_is_allowed_counts_as_spent_until_it_is_committed() -> None:
    controller = RunController()
    units = [(f"unit {number}", 256) for number in range(120)]
    plan = ControlPlan.of("run", units, slots=16)  # 30,720 rows: room for eight blocks
    register(controller, control=plan, rows_total=30_720)
    assert plan.reason is None
    allowed = [controller.may_measure(RUN, name) for name in plan.ranks]
    assert sum(allowed) == 5, "the first ones say how many more"
