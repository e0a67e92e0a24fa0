"""Waiting for replicas: counted while it lasts, ended by the first one, and not for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import FleetUnavailable
from cluster.events import RunEvent
from cluster.runs.replica_wait import ReplicaWait

COUNTS = st.one_of(st.none(), st.integers(0, 3))


@given(steps=st.lists(st.tuples(st.floats(0.1, 40.0), COUNTS), max_size=60))
def test_the_wait_ends_the_run_exactly_when_no_replica_was_up_for_the_patience(
    steps: list[tuple[float, int | None]],
) -> None:
    reported = 0

    def report(kind: RunEvent, seconds: int) -> None:
        nonlocal reported
        assert kind is RunEvent.REPLICAS_WAITED
        assert seconds > 0
        reported += seconds

    wait = ReplicaWait(report, patience_seconds=100.0)
    now, last, since, waited = 0.0, 0.0, None, 0.0
    for seconds, live in steps:
        now += seconds
        if live:
            waited += 0.0 if since is None else int(last - since)
            since = None
        elif live == 0 and since is None:
            since = last = now
        if since is not None:
            last = now
        if since is not None and now - since >= 100.0:
            with pytest.raises(FleetUnavailable, match="no replica was up for"):
                wait.observe(live, now)
            return
        wait.observe(live, now)
    waited += 0.0 if since is None else int(last - since)
    assert reported == waited


def test_unknown_counts_begin_no_wait() -> None:
    reported: list[int] = []
    wait = ReplicaWait(lambda kind, seconds: reported.append(seconds), patience_seconds=10.0)
    for second in range(100):
        wait.observe(None, float(second))
    assert reported == []
