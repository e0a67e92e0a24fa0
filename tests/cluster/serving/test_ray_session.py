"""The cluster that a command joins: the one whose address `ray start` recorded, if it listens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from cluster.errors import FleetUnavailable
from cluster.serving import ray_session
from cluster.serving.ray_session import _current_cluster


@pytest.fixture
def address_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_without_an_address_file_there_is_no_cluster(address_file: Path) -> None:
    assert _current_cluster() is None


def test_a_cluster_that_listens_at_the_recorded_address_is_joined(address_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address_file.write_text(f"127.0.0.1:{server.getsockname()[1]}\n")
        assert _current_cluster() == address_file.read_text().strip()


def test_the_address_of_a_stopped_cluster_is_ignored_without_waiting(address_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address_file.write_text(f"127.0.0.1:{port}")
    assert _current_cluster() is None
    address_file.write_text("nonsense")
    assert _current_cluster() is None


def test_a_named_cluster_that_does_not_listen_is_an_error_and_not_a_long_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_session, "_LISTEN_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(FleetUnavailable, match=rf"no Ray at 127.0.0.1:{port}.*RAY_ADDRESS"):
        ray_session._connect(ExitStack(), None, 1)


def test_a_ray_that_does_not_start_is_an_error_that_says_what_to_do(
    address_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**settings: Any) -> None:
        raise RuntimeError("Timed out waiting for file gcs_server_port")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(FleetUnavailable, match=r"did not start.*gcs_server_port.*again"):
        ray_session._connect(ExitStack(), None, 1)


def test_a_head_that_listens_again_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    servers: list[socket.socket] = []
    monkeypatch.setattr(
        "time.sleep", lambda _: servers.append(socket.create_server(("127.0.0.1", port)))
    )
    ray_session._wait_until_it_listens(f"127.0.0.1:{port}")
    assert len(servers) == 1
    servers[0].close()


@pytest.mark.slow
def test_a_head_that_died_since_it_was_probed_is_an_error_within_a_minute() -> None:
    """As a driver meets it that was stopped in between; Ray's own patience is 14 minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    join = (
        "from contextlib import ExitStack\n"
        "from cluster.serving import ray_session\n"
        "ray_session._wait_until_it_listens = lambda address: None\n"
        "ray_session._connect(ExitStack(), None, 1)\n"
    )
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    done = subprocess.run(
        [sys.executable, "-c", join], env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"FleetUnavailable: no Ray at 127.0.0.1:{port}" in done.stderr


def test_a_local_ray_has_room_for_the_pipeline_beside_its_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("ray.init", lambda **options: started.append(options["num_cpus"]))
    monkeypatch.setattr("ray.cluster_resources", dict)
    for replicas in (1, 8):
        assert ray_session._connect(ExitStack(), None, replicas)
    assert started == [4, 11]


def test_a_head_that_refuses_is_an_error_that_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str | None] = []

    def init(**_: object) -> None:
        asked.append(os.environ.get(ray_session._RAY_CONNECTS))
        raise ConnectionError("no")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.delenv(ray_session._RAY_CONNECTS, raising=False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(FleetUnavailable, match=r"no Ray at auto: no\. Set RAY_ADDRESS"):
        ray_session._connect(ExitStack(), None, 1)
    assert ray_session._RAY_CONNECTS not in os.environ
    monkeypatch.setenv(ray_session._RAY_CONNECTS, "7")
    with pytest.raises(FleetUnavailable):
        ray_session._connect(ExitStack(), None, 1)
    assert asked == ["1", "7"], "what somebody has set stays"


class SilentController:
    """Serve's controller, whose answer does not come, or which is gone."""

    class get_serve_instance_details:
        @staticmethod
        def remote() -> str:
            return "question"


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SimpleNamespace(_controller=SilentController)
    monkeypatch.setattr(ray_session, "_get_global_client", lambda **_: client)


def test_a_controller_that_does_not_answer_holds_nobody(
    silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that keeps the lease asks, and would lose the lease while it waits."""

    def get(question: str, *, timeout: float) -> None:
        assert 0 < timeout <= 10
        raise GetTimeoutError

    monkeypatch.setattr("ray.get", get)
    with pytest.raises(GetTimeoutError):
        ray_session.serve_details()


def test_the_client_of_a_serve_that_was_shut_down_is_dropped(
    silent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(question: str, *, timeout: float) -> None:
        raise ActorDiedError

    clients: list[object] = []
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(ray_session, "_set_global_client", clients.append)
    assert ray_session.serve_details() is None
    assert clients == [None]


def listen_as_serve_does(port: int) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


@pytest.fixture
def default_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Another one than 8000, where somebody's Serve may be."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    monkeypatch.setattr(ray_session, "DEFAULT_PORT", port)
    return port


def test_jobs_that_start_at_once_have_ports_of_their_own(default_port: int) -> None:
    """Between its choice and the moment at which Serve listens there, nobody else is given a port;
    nor later."""
    with ExitStack() as starting, ExitStack() as serving:
        ports = [starting.enter_context(ray_session._held_port("127.0.0.1")) for _ in range(5)]
        assert ports[0] == default_port
        assert len(set(ports)) == 5
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: held_alone(set(ports)), range(64)))
        servers = [serving.enter_context(listen_as_serve_does(port)) for port in ports]
        for port, server in zip(ports * 8, servers * 8, strict=True):
            with socket.create_connection(("127.0.0.1", port), 5):
                server.settimeout(5)
                server.accept()[0].close()  # the socket that holds the port gets none
        starting.close()
        held_alone(set(ports))


def held_alone(taken: set[int]) -> None:
    with ray_session._held_port("127.0.0.1") as port:
        assert port not in taken


@pytest.mark.parametrize("given", [None, 12_345])
def test_the_port_is_held_until_serve_listens_there(
    given: int | None, default_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def start(*, http_options: dict[str, Any], **_: object) -> None:
        started.append(http_options["port"])
        if given is None:
            with pytest.raises(OSError, match="in use"), socket.socket() as other:
                other.bind(("127.0.0.1", default_port))

    monkeypatch.setattr(ray_session, "serve_details", lambda: None)
    monkeypatch.setattr("ray.serve.start", start)
    assert ray_session.join_serve(host="127.0.0.1", port=given)
    assert started == [given or default_port]


def test_a_host_without_a_free_port_is_an_error() -> None:
    with (
        pytest.raises(FleetUnavailable, match=r"no free port on 192\.0\.2\.1"),
        ray_session._held_port("192.0.2.1"),  # no address of this machine
    ):
        pass


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head"])
def test_other_addresses_are_left_to_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("socket.create_connection", lambda *where: asked.append(where))
    ray_session._wait_until_it_listens(address)
    assert asked == []


STARTS = """
import os, signal, sys
from contextlib import ExitStack
import ray
from cluster.errors import FleetUnavailable
from cluster.serving import ray_session
from cluster.termination import Terminated, raise_on_sigterm

def init(**_):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    if sys.argv[1] == "during":
        os.kill(os.getpid(), signal.SIGTERM)
    if sys.argv[1] == "after a failure":
        raise ConnectionError("no")

ray.init, ray.cluster_resources = init, dict
ray.shutdown = lambda: print("left", flush=True)
os.environ["RAY_ADDRESS"] = "auto" if sys.argv[1] == "after a failure" else "local"
raise_on_sigterm()
try:
    with ExitStack() as stack:
        try:
            ray_session.join_ray(stack)
        except FleetUnavailable:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
except Terminated:
    print("Terminated")
"""


@pytest.mark.parametrize("moment", ["during", "after", "after a failure"])
def test_a_process_that_is_told_to_end_while_ray_starts_ends_by_its_own_handler(
    moment: str,
) -> None:
    """Ray's would end it with code 15. Whatever Ray has started by then is ended."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS, moment], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["left", "Terminated"]


TWO_CLUSTERS = """
import ray
from cluster.serving.fleet import FleetSettings, open_fleet
from cluster.serving.replica import EngineSettings

engine = EngineSettings(model="fake-model", engine="tests.cluster.fake_engine:FakeEngine", slots=2)
for _ in range(2):
    with open_fleet(FleetSettings(engine=engine)) as fleet:
        print("served", fleet.stats().replicas[0].model, flush=True)
    assert not ray.is_initialized()
"""


@pytest.mark.slow
def test_a_process_opens_a_fleet_on_one_local_ray_after_another() -> None:
    """Each local cluster numbers its jobs from 1, so Serve takes its client of the first cluster
    for one of the second."""
    environment = os.environ | {"RAY_ADDRESS": "local"}
    command = [sys.executable, "-c", TWO_CLUSTERS]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines().count("served fake-model") == 2
