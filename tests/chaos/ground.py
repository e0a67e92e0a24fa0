"""What a run happens on, kept from one run to the next: Ray nodes, an S3 server, the proxy.

Everything started here ends with this process: Ray's nodes have reapers, the server reads a pipe.
Ray's files lie in a folder of their own, so nobody else on the machine takes this cluster for his.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from cluster.demo.local_s3 import LocalS3
from tests.chaos.proxy import FaultProxy
from tests.chaos.schedule import BATCH_SECONDS

REPOSITORY: Final = Path(__file__).resolve().parents[2]
_CPUS: Final = {1: (4,), 2: (3, 2), 3: (2, 2, 2)}
_STORE_BYTES: Final = 100 * 2**20
_UP_SECONDS: Final = 90.0
_ENDPOINT: Final = "endpoint"
ENVIRONMENT: Final = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SPPRUNER_LOG_LEVEL": "debug",
    "SPPRUNER_LOG_FORMAT": "keyvalue",
}


class Ground:
    """Context manager. `prepare` gives a cluster of a shape, the last one if it is still whole."""

    proxy: FaultProxy
    """Before the S3 server; set on entry."""
    server: LocalS3
    """The S3 server; set on entry."""
    folder: Path
    """Everything on disk; set on entry."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._cluster: Any = None
        self._shape: tuple[int, bool] | None = None
        self._dirty = False

    def __enter__(self) -> Ground:
        # Short: Ray's sockets lie in it, whose paths are bounded.
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        (self.folder / "signals").mkdir()
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        before = dict(os.environ)
        self._stack.callback(_restore, before)
        os.environ.update(ENVIRONMENT)
        os.environ["RAY_TMPDIR"] = str(self.folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        os.environ.pop("RAY_ADDRESS", None)
        self.server = self._stack.enter_context(LocalS3("first"))
        self.proxy = self._stack.enter_context(FaultProxy(self.server.endpoint))
        os.environ["AWS_ENDPOINT_URL"] = self.proxy.endpoint  # for Ray's workers and the drivers
        return self

    def __exit__(self, *error: object) -> None:
        self.remove_cluster()
        self._stack.close()

    @property
    def address(self) -> str:
        """Of the cluster's head."""
        return str(self._cluster.address)

    @property
    def engine_options(self) -> dict[str, str | float]:
        """Of the endpoint's engine."""
        return {"signals": str(self.folder / "signals"), "tag": _ENDPOINT,
                "seconds": BATCH_SECONDS}  # fmt: skip

    def forget_objects(self) -> None:
        """Empties the S3 server."""
        request = urllib.request.Request(f"{self.server.endpoint}/moto-api/reset", method="POST")
        urllib.request.urlopen(request, timeout=30).close()

    def prepare(self, nodes: int, *, attached: bool) -> None:
        """A cluster with so many raylets, and with an endpoint if `attached`."""
        for file in (self.folder / "signals").iterdir():
            file.unlink()
        shape = (nodes, attached)
        if self._cluster is not None and (self._dirty or self._shape != shape):
            self.remove_cluster()
        if self._cluster is not None and not self._mend(attached):
            self.remove_cluster()
        if self._cluster is None:
            self._shape = shape
            self._dirty = False
            self.start_cluster()

    def spoil(self) -> None:
        """The next run gets a new cluster."""
        self._dirty = True

    def start_cluster(self) -> None:
        """Starts the nodes, and the endpoint of an attached shape."""
        from ray.cluster_utils import Cluster

        assert self._shape is not None
        nodes, attached = self._shape
        head = {"num_cpus": _CPUS[nodes][0], "include_dashboard": False}
        handler = signal.getsignal(signal.SIGTERM)
        self._cluster = Cluster(
            initialize_head=True, head_node_args={**head, "object_store_memory": _STORE_BYTES}
        )
        for number in range(1, nodes):
            self.add_node(_CPUS[nodes][number])
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process without cleaning
        if attached:
            with self._connected():
                self._deploy()

    def remove_cluster(self) -> None:
        """Ends every process of the cluster, at once."""
        if self._cluster is None:
            return
        cluster, self._cluster = self._cluster, None
        for node in [*cluster.worker_nodes, cluster.head_node]:
            if node is not None:
                cluster.remove_node(node, allow_graceful=False)

    def add_node(self, cpus: int = 2) -> None:
        """One more raylet."""
        self._cluster.add_node(num_cpus=cpus, object_store_memory=_STORE_BYTES)

    def kill_node(self, draw: random.Random) -> None:
        """Kills a raylet that is not the head's."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))
        self._cluster.remove_node(draw.choice(nodes), allow_graceful=False)

    def raylets(self) -> set[int]:
        """Process ids of the raylets."""
        if self._cluster is None:
            return set()
        return {
            info.process.pid
            for node in self._cluster.list_all_nodes()
            for info in node.all_processes.get("raylet", ())
        }

    def session_logs(self) -> Path:
        """Ray's logs of this cluster."""
        return Path(self._cluster.head_node.get_logs_dir_path())

    def _mend(self, attached: bool) -> bool:
        """Brings the cluster back to its shape after a run; False where a new one is quicker."""
        assert self._shape is not None
        while len(self.raylets()) < self._shape[0]:
            self.add_node()
        try:
            with self._connected():
                return self._remove_applications(attached)
        except Exception:  # of Ray or Serve, whatever the last run's faults left of them
            return False

    def _remove_applications(self, attached: bool) -> bool:
        from ray import serve

        if not attached:
            serve.shutdown()
            return True
        applications = serve.status().applications
        for name in applications:
            if name != _ENDPOINT:
                serve.delete(name)
        return _ENDPOINT in applications and _is_up()

    def _deploy(self) -> None:
        from ray import serve

        from cluster.serving.application import FleetSettings, application
        from cluster.serving.engine_settings import EngineSettings
        from sppruner.models.loading import EMBEDDED, resolve_model
        from tests.chaos.driver import fake

        engine = EngineSettings(model=EMBEDDED, revision=resolve_model(EMBEDDED).revision)
        settings = fake(FleetSettings(engine=engine, replicas=2), self.engine_options)
        serve.start(
            http_options={"host": "127.0.0.1", "port": _free_port()}, proxy_location="HeadOnly"
        )
        serve.run(application(settings), name=_ENDPOINT, route_prefix="/")

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Connected for a moment: this process must not be a driver when the head is killed."""
        import ray
        from ray.serve.context import _set_global_client

        handler = signal.getsignal(signal.SIGTERM)
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            ray.shutdown()
            _set_global_client(None)


def _is_up() -> bool:
    """Whether the endpoint runs again, within a minute or so."""
    from ray import serve

    deadline = time.monotonic() + _UP_SECONDS
    while time.monotonic() < deadline:
        application = serve.status().applications[_ENDPOINT]
        states = [deployment.status for deployment in application.deployments.values()]
        if application.status == "RUNNING" and all(state == "HEALTHY" for state in states):
            return True
        time.sleep(0.3)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _restore(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)
