"""Fleets: deploying, attaching to and removing Serve applications, and their command line."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import httpx
import pytest
from ray import serve

import cluster
import cluster.fleet
from cluster.errors import Busy, FleetUnavailable, UsageError
from cluster.protocol import LabelRequest, Priority
from cluster.serving.application import FleetSettings, endpoint, fingerprint
from cluster.serving.client import ServeReplicas
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, open_fleet
from cluster.serving.ray_session import serve_details
from sppruner.models.loading import resolve_model
from tests.cluster.fake_engine import expected_text, picture

ENGINE = "tests.cluster.fake_engine:FakeEngine"


def settings(model: str = "fake-model", **more: object) -> FleetSettings:
    """The settings of the session's fleet; `model` and `more` override them."""
    options = {"seconds": 0.05}
    engine = EngineSettings(model=model, engine=ENGINE, slots=4, options=options)
    return FleetSettings(engine=engine, **more)  # type: ignore[arg-type]


def applications() -> set[str]:
    details = serve_details()
    return set(details.applications) if details else set()


def label(fleet: Fleet, *calls: LabelRequest) -> list[str | None]:
    replicas = ServeReplicas(fleet.handle)
    answers = asyncio.run(replicas.label(calls, priority=Priority.BATCH))
    return [answer.text for answer in answers]


def test_a_deployed_fleet_is_reached_by_handle_and_by_http(fleet: Fleet) -> None:
    assert label(fleet, LabelRequest(id="a", prompt="p", images=(picture(3),))) == [
        expected_text(picture(3))
    ]
    assert httpx.get(f"{fleet.http_url}/healthz").json()["model"] == "fake-model"
    assert (fleet.deployed_here, fleet.replicas, fleet.slots) == (True, 1, 4)
    assert (fleet.model, fleet.model_revision) == ("fake-model", "fake-1")
    assert fleet.stats().rows >= 1


def test_a_second_fleet_of_the_same_model_attaches_and_leaves_the_application_running(
    fleet: Fleet,
) -> None:
    with open_fleet(settings(replicas=3)) as second:
        assert (second.app, second.http_url) == (fleet.app, fleet.http_url)
        assert not second.deployed_here
        assert second.replicas == 1
    assert label(fleet, LabelRequest(id="a", prompt="p", images=(picture(1),))) == [
        expected_text(picture(1))
    ]


def test_another_model_has_its_own_application_and_removes_only_that(fleet: Fleet) -> None:
    before = applications()
    with open_fleet(settings("other-model")) as other:
        assert other.app not in before
        assert other.http_url == f"{fleet.http_url}/{other.app}"
        assert httpx.get(f"{other.http_url}/healthz").json()["model"] == "other-model"
    assert applications() == before


@pytest.mark.slow
def test_an_application_of_any_name_is_found_by_its_deployment(fleet: Fleet) -> None:
    from cluster.serving.application import application

    wanted = settings("long-lived")
    serve.run(application(wanted), name="my-endpoint", route_prefix="/mine")
    try:
        with open_fleet(wanted) as found:
            assert (found.app, found.deployed_here) == ("my-endpoint", False)
        assert "my-endpoint" in applications()
    finally:
        serve.delete("my-endpoint")


@pytest.mark.slow
def test_an_engine_that_fails_to_start_is_reported_and_its_application_removed(
    fleet: Fleet,
) -> None:
    before = applications()
    with (
        pytest.raises(FleetUnavailable, match="no weights under 'missing'"),
        open_fleet(settings("missing")),
    ):
        pass
    assert applications() == before


@pytest.mark.slow
def test_a_fleet_without_resources_fails_after_its_start_timeout(fleet: Fleet) -> None:
    impossible = settings("too-many", replicas=50, start_timeout_seconds=3.0)
    with pytest.raises(FleetUnavailable, match="fewer replicas"), open_fleet(impossible):
        pass
    assert "too-many" not in str(applications())


def test_busy_crosses_serve_as_the_typed_error(fleet: Fleet) -> None:
    many = [LabelRequest(id=str(n), prompt="p", images=(picture(n),)) for n in range(12)]

    async def flood() -> list[object]:
        replicas = ServeReplicas(fleet.handle)
        calls = [replicas.label(many, priority=Priority.BATCH) for _ in range(12)]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(flood())
    refused = [o for o in outcomes if isinstance(o, BaseException)]
    assert refused
    assert all(isinstance(error, Busy) for error in refused)


def test_clients_never_find_replicas_of_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    known = settings("m").name
    monkeypatch.setattr("cluster.serving.application.VERSION", 999)
    assert settings("m").name != known


def test_the_fingerprint_covers_exactly_the_settings_that_change_results() -> None:
    base = EngineSettings(model="m")
    assert fingerprint(base) == fingerprint(EngineSettings(model="m", slots=99))
    others = [
        EngineSettings(model="n"),
        EngineSettings(model="m", revision="r"),
        EngineSettings(model="m", dtype="float32"),
        EngineSettings(model="m", options={"a": 1}),
    ]
    assert len({fingerprint(engine) for engine in [base, *others]}) == 5


def test_the_former_address_of_the_endpoint_still_works_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=r"use `serve run cluster:endpoint"):
        deprecated = cluster.fleet.build({"model": "tiny-llava"})
    assert isinstance(deprecated, serve.Application)
    assert cluster.endpoint is endpoint


def test_endpoint_parses_command_line_strings_and_pins_the_model_revision() -> None:
    revision = resolve_model("tiny-llava").revision
    pinned = EngineSettings(model="tiny-llava", revision=revision, slots=8)

    built = endpoint({"model": "tiny-llava", "replicas": "2", "prune": "grid", "retain": "0.5"})

    (replica,) = [
        arg for arg in built._bound_deployment.init_args if hasattr(arg, "_bound_deployment")
    ]
    assert replica._bound_deployment.name == FleetSettings(engine=pinned).name
    assert replica._bound_deployment.num_replicas == 2


def test_endpoint_refuses_unknown_and_invalid_arguments() -> None:
    with pytest.raises(UsageError, match="model=PATH"):
        endpoint({"modle": "x"})
    with pytest.raises(UsageError, match="true or false"):
        endpoint({"model": "x", "auto": "yes"})
    with pytest.raises(UsageError, match="name a method"):
        endpoint({"model": "x", "auto": "true"})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prune": "spruner"}, "there are none"),
        ({"prune": "sppruner:kapa=1"}, "no option 'kapa'"),
        ({"prune": "sppruner", "retain": "2"}, "outside"),
        ({"retain": "0.5"}, "add prune=METHOD"),
        ({"model": "no/such-model"}, "not a local folder"),
    ],
)
def test_endpoint_refuses_what_every_request_would_fail_on(
    args: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        endpoint({"model": "tiny-llava"} | args)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replicas", "0"),
        ("replicas", "two"),
        ("max_batch_rows", "-1"),
        ("max_batch_rows", "1.5"),
        ("retain", "half"),
        ("retain", "nan"),
    ],
)
def test_endpoint_names_the_argument_that_is_no_usable_number(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{name}={value}: give a number"):
        endpoint({"model": "tiny-llava", "prune": "grid", name: value})


@pytest.mark.slow
def test_without_a_cluster_a_fleet_starts_and_stops_its_own_ray(tmp_path: Path) -> None:
    """Runs in another process, because this one is connected to the session's Ray."""
    script = tmp_path / "job.py"
    script.write_text(
        dedent(
            """
            import os, ray
            from cluster.serving.application import FleetSettings
            from cluster.serving.fleet import open_fleet
            from cluster.serving.engine_settings import EngineSettings

            @ray.remote(num_cpus=0)
            def seen():
                return os.environ.get("FROM_THE_JOB")

            engine = EngineSettings(model="own", engine="tests.cluster.fake_engine:FakeEngine")
            settings = FleetSettings(engine=engine, environment={"FROM_THE_JOB": "yes"})
            with open_fleet(settings) as fleet:
                assert fleet.stats().replicas[0].model == "own"
                assert ray.get(seen.remote()) == "yes"
            assert not ray.is_initialized()
            """
        )
    )
    environment = os.environ | {"RAY_ADDRESS": "local"}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=120)
