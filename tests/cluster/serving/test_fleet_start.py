"""How long a fleet waits for its first replica."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError
from ray.serve.schema import ApplicationStatus, ReplicaState

from cluster.errors import FleetUnavailable
from cluster.serving.application import FleetSettings
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import _wait
from tests.cluster.store.clock import FakeClock


@pytest.mark.parametrize(("loading", "ends_at"), [(1_000, None), (3_700, 3_600), (None, 900)])
def test_a_replica_that_is_still_loading_is_given_more_time_than_one_without_a_place(
    loading: int | None, ends_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """loading: seconds until it runs, the HTTP edge a while later; None where it gets no place.
    Serve's controller does not answer every tenth question."""
    clock, ours = FakeClock(), FleetSettings(engine=EngineSettings(model="slow"))
    time = SimpleNamespace(monotonic=clock.now, sleep=clock.sleep)
    monkeypatch.setattr("cluster.serving.fleet.time", time)

    def details() -> object:
        if round(clock.time * 2) % 10 == 0:
            raise GetTimeoutError
        up = loading is not None and clock.time >= loading
        replica = SimpleNamespace(
            state=ReplicaState.RUNNING if up else ReplicaState.STARTING,
            node_id=None if loading is None else "n1",
            node_ip="10.0.0.7",
        )
        model = SimpleNamespace(replicas=[replica], message="")
        late = loading is not None and clock.time >= loading + 5
        edge_state = ReplicaState.RUNNING if late else ReplicaState.STARTING
        edge = SimpleNamespace(replicas=[SimpleNamespace(state=edge_state)], message="")
        app = SimpleNamespace(
            name=ours.app, status=ApplicationStatus.DEPLOYING, message="",
            deployments={ours.name: model, "api": edge},
        )  # fmt: skip
        return SimpleNamespace(applications={ours.app: app})

    monkeypatch.setattr("cluster.serving.fleet.serve_details", details)
    if ends_at is None:
        assert _wait(ours.app, ours).name == ours.app
        assert clock.time >= 1_005
        return
    cause = "no replica could be placed" if loading is None else "still loading on 10.0.0.7"
    with pytest.raises(FleetUnavailable, match=rf"not up after {ends_at} s: {cause}"):
        _wait(ours.app, ours)
