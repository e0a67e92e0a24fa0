"""Schedules: a seed is a run, and the seeds together have every kind of fault."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.chaos.__main__ import main
from tests.chaos.corpus import BAD_ROWS, DAMAGES
from tests.chaos.faults import _STRIKES
from tests.chaos.schedule import _KINDS, draw_schedule

SCHEDULES = [draw_schedule(seed) for seed in range(200)]


def test_a_seed_is_one_schedule_on_one_line() -> None:
    for schedule in SCHEDULES:
        again = draw_schedule(schedule.seed)
        assert again == schedule
        assert json.loads(schedule.to_json())["seed"] == schedule.seed
        assert "\n" not in schedule.to_json()


def test_two_hundred_seeds_have_every_fault_and_every_kind_of_bad_row() -> None:
    kinds = Counter(fault.kind for schedule in SCHEDULES for fault in schedule.faults)
    assert kinds.keys() == _KINDS.keys() == _STRIKES.keys()
    bad = {kind for schedule in SCHEDULES for kind in schedule.corpus.bad}
    assert bad == BAD_ROWS.keys()
    assert {schedule.corpus.damage for schedule in SCHEDULES} == {None, *DAMAGES}
    assert {(s.nodes, s.attached, s.store) for s in SCHEDULES} == {
        (nodes, attached, store)
        for nodes in (1, 2, 3)
        for attached in (False, True)
        for store in ("s3", "local")
    }


def test_schedules_ask_for_what_can_happen() -> None:
    for schedule in SCHEDULES:
        kinds = {fault.kind for fault in schedule.faults}
        assert schedule.nodes > 1 or "kill_node" not in kinds
        assert schedule.store == "local" or "full_disk" not in kinds
        assert schedule.store == "s3" or not kinds & {"outage", "hung_requests"}


def test_the_plan_is_printed_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3:5,9", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [3, 4, 9]
    with pytest.raises(SystemExit):
        main(["--seeds", "3-5"])
