"""Fleets: deploying, attaching to and removing Serve applications, and their command line."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent

import httpx
import pytest
import ray
from ray import serve

import cluster
import cluster.fleet
from cluster.errors import Busy, FleetUnavailable, UsageError
from cluster.protocol import LabelRequest, Priority
from cluster.serving.application import FleetSettings, application, endpoint, fingerprint
from cluster.serving.client import ServeReplicas
from cluster.serving.engine_settings import EngineSettings
from cluster.serving.fleet import Fleet, _deploy, open_fleet
from cluster.serving.janitor import PATIENCE_SECONDS, Janitor
from cluster.serving.ray_session import serve_details
from cluster.serving.serve_state import is_job_application, live_replicas
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


def test_a_lease_that_looks_at_serve_does_not_spoil_a_deployment(fleet: Fleet) -> None:
    """Making and reading Serve's settings changes a registry of cloudpickle's for a moment."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor() as threads:
            looking = [threads.submit(applications) for _ in range(40)]
            deploying = [threads.submit(_deploy, settings("raced")) for _ in range(4)]
            building = [threads.submit(application, settings("raced")) for _ in range(40)]
            for done in looking + building:
                done.result(timeout=120)
            for deployment in deploying:
                deployment.result(timeout=120)
        assert settings("raced").app in applications()
    finally:
        sys.setswitchinterval(interval)
        serve.delete(settings("raced").app)


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


def test_jobs_that_start_at_once_share_a_fleet_and_the_last_one_removes_it(fleet: Fleet) -> None:
    """Whichever deploys it: the job that ends first takes nothing from the other."""
    before = applications()
    with ThreadPoolExecutor() as threads, ExitStack() as first, ExitStack() as second:
        opening = [
            threads.submit(stack.enter_context, open_fleet(settings("shared")))
            for stack in (first, second)
        ]
        one, other = (future.result(timeout=120) for future in opening)
        assert sorted([one.deployed_here, other.deployed_here]) == [False, True]
        (first if one.deployed_here else second).close()
        assert label(other, LabelRequest(id="a", prompt="p", images=(picture(3),))) == [
            expected_text(picture(3))
        ]
        assert one.app in applications()
    assert applications() == before


def test_the_janitor_removes_what_jobs_left_and_neither_what_is_held_nor_endpoints(
    fleet: Fleet,
) -> None:
    """A killed job is not heard of any more."""
    left, endpoint_name = settings("left"), "my-endpoint"
    for name in (left.app, endpoint_name):
        serve.run(application(left), name=name, route_prefix=f"/{name}")
    janitor = Janitor(patience_seconds=0.5)

    async def rounds() -> None:
        await janitor.hold(left.app, "killed")
        await janitor.patrol()
        await asyncio.sleep(0.6)
        for held in applications_of_jobs - {left.app}:
            await janitor.hold(held, "alive")
        await janitor.patrol()

    try:
        applications_of_jobs = {name for name in applications() if is_job_application(name)}
        assert {left.app, fleet.app} <= applications_of_jobs
        asyncio.run(rounds())
        assert left.app not in applications()
        assert {fleet.app, endpoint_name} <= applications()
    finally:
        serve.delete(endpoint_name)


def test_the_replicas_of_a_deployment_are_counted_without_blocking_the_loop(fleet: Fleet) -> None:
    assert asyncio.run(live_replicas(fleet.app, fleet.deployment)) == 1
    assert asyncio.run(live_replicas(fleet.app, "other")) == 0
    assert asyncio.run(live_replicas("other", fleet.deployment)) == 0


@pytest.mark.slow
def test_the_fleet_of_a_killed_job_is_removed(fleet: Fleet, tmp_path: Path) -> None:
    """By the janitor's rounds, some time after the job was last heard of."""
    before = applications()
    script = tmp_path / "job.py"
    script.write_text(
        dedent(
            """
            import time
            from tests.cluster.serving.test_fleet import open_fleet, settings
            with open_fleet(settings("killed")):
                print("up", flush=True)
                time.sleep(600)
            """
        )
    )
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert b"up\n" in iter(job.stdout.readline, b"")  # after lines of the log
        job.kill()
    assert applications() > before
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    while applications() != before:
        assert time.monotonic() < deadline
        time.sleep(1)


@pytest.mark.slow
def test_a_fleet_is_open_with_its_first_replica_while_others_find_no_room(fleet: Fleet) -> None:
    """The session's Ray has four CPUs, of which the shared fleet takes one."""
    with open_fleet(settings("partly", replicas=9)) as opened:
        assert 1 <= opened.replicas < opened.target_replicas == 9
        assert 1 <= len(opened.stats().replicas) < 9
        assert label(opened, LabelRequest(id="a", prompt="p", images=(picture(3),))) == [
            expected_text(picture(3))
        ]


@pytest.mark.slow
def test_an_application_of_any_name_is_found_by_its_deployment(fleet: Fleet) -> None:
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
    before = applications()
    with open_fleet(settings("all-cpus", replicas=9)) as other:
        while asyncio.run(live_replicas(other.app, other.deployment)) < 3:  # type: ignore[operator]
            time.sleep(0.2)
        impossible = settings("no-room", start_timeout_seconds=3.0)
        with (
            pytest.raises(FleetUnavailable, match="more GPUs or CPUs, or end job-vlm-"),
            open_fleet(impossible),
        ):
            pass
    assert applications() == before


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


def test_a_fleet_with_other_code_is_never_attached_to(monkeypatch: pytest.MonkeyPatch) -> None:
    known = settings("m").name
    monkeypatch.setattr("cluster.serving.application.code_version", lambda: "another")
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
def test_without_keys_a_fleet_answers_its_own_machine_alone_whatever_it_is_bound_to(
    tmp_path: Path,
) -> None:
    """Runs in another process: this session's Serve is bound to loopback."""
    script = tmp_path / "job.py"
    script.write_text(
        dedent(
            """
            import socket
            import httpx
            from urllib.parse import urlsplit
            from cluster.serving.application import FleetSettings
            from cluster.serving.fleet import open_fleet
            from cluster.serving.engine_settings import EngineSettings

            engine = EngineSettings(model="own", engine="tests.cluster.fake_engine:FakeEngine")
            with open_fleet(FleetSettings(engine=engine, host="0.0.0.0")) as fleet:
                port = urlsplit(fleet.http_url).port
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                    probe.connect(("192.0.2.1", 9))  # sends nothing, and names our own address
                    outside = probe.getsockname()[0]
                assert not outside.startswith("127."), outside

                def ask(host, path):
                    return httpx.get(f"http://{host}:{port}{path}", trust_env=False).status_code

                assert ask("127.0.0.1", "/v1/models") == 200
                assert ask(outside, "/v1/models") == 403
                assert ask(outside, "/healthz") == 200
            """
        )
    )
    environment = os.environ | {"RAY_ADDRESS": "local"}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=120)


@pytest.mark.slow
def test_without_a_cluster_a_fleet_starts_and_stops_its_own_ray(tmp_path: Path) -> None:
    """Runs in another process, because this one is connected to the session's Ray."""
    script = tmp_path / "job.py"
    script.write_text(
        dedent(
            """
            import os, ray, subprocess, sys
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
                with open_fleet(settings) as again:  # as a job in the same process does
                    assert not again.deployed_here
                assert fleet.stats().replicas[0].model == "own"
                if os.environ["RAY_ADDRESS"] == "local":  # a job of another process, which leaves
                    assert fleet.deployed_here
                    address = ray.get_runtime_context().gcs_address
                    here = os.environ | {"RAY_ADDRESS": address}
                    subprocess.run([sys.executable, __file__], env=here, check=True, timeout=60)
                    assert fleet.stats().replicas[0].model == "own"
                else:
                    assert not fleet.deployed_here
            assert not ray.is_initialized()
            """
        )
    )
    environment = os.environ | {"RAY_ADDRESS": "local"}
    subprocess.run([sys.executable, script], env=environment, check=True, timeout=120)
