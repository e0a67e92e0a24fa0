"""What a run happens on, kept from one run to the next: Ray nodes, an S3 server, the proxy.

Everything started here ends with this process: Ray's nodes have reapers, the server reads a pipe.
Ray's files lie in a folder of their own, so nobody else on the machine takes this cluster for his.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from cluster.demo.local_s3 import LocalS3
from tests.chaos.forks import Forks
from tests.chaos.processes import send
from tests.chaos.proxy import FaultProxy
from tests.chaos.schedule import BATCH_SECONDS, endpoint_replicas

REPOSITORY: Final = Path(__file__).resolve().parents[2]
_CPUS: Final = {1: (4,), 2: (3, 2), 3: (2, 2, 2)}
_STORE_BYTES: Final = 100 * 2**20
_DEPLOY_SECONDS: Final = 240.0
_STARTS: Final = 3
_ENDPOINT: Final = "endpoint"
ENVIRONMENT: Final = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_raylet_start_wait_time_s": "120",
    "SPPRUNER_LOG_LEVEL": "debug",
    "SPPRUNER_LOG_FORMAT": "keyvalue",
}


_UNKNOWN: Final = object()


class Ground:
    """Context manager. `prepare` gives a cluster of a shape, the last one if it is still whole."""

    proxy: FaultProxy
    """Before the S3 server; set on entry."""
    server: LocalS3
    """The S3 server; set on entry."""
    forks: Forks
    """Starts the processes that connect to Ray; set on entry."""
    folder: Path
    """Everything on disk; set on entry."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._cluster: Any = None
        self._shape: tuple[int, bool] | None = None
        self._dirty = False
        self._client_before: Any = _UNKNOWN

    def __enter__(self) -> Ground:
        # Short: Ray's sockets lie in it, whose paths are bounded.
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        self._stack.callback(_remove, self.folder)
        self.signals.mkdir()
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
        self.forks = self._stack.enter_context(Forks())
        return self

    def __exit__(self, *error: object) -> None:
        self.remove_cluster()
        self._stack.close()

    @property
    def address(self) -> str:
        """Of the cluster's head."""
        return str(self._cluster.address)

    @property
    def signals(self) -> Path:
        """Where engines look for faults of the moment."""
        return self.folder / "signals"

    @property
    def engine_options(self) -> dict[str, str | float]:
        """Of the endpoint's engine."""
        return {"signals": str(self.signals), "tag": _ENDPOINT,
                "seconds": BATCH_SECONDS}  # fmt: skip

    def forget_objects(self) -> None:
        """Empties the S3 server."""
        request = urllib.request.Request(f"{self.server.endpoint}/moto-api/reset", method="POST")
        urllib.request.urlopen(request, timeout=30).close()

    def prepare(self, nodes: int, *, attached: bool) -> None:
        """A cluster with so many raylets, and with an endpoint if `attached`."""
        for file in self.signals.iterdir():
            file.unlink()
        shape = (nodes, attached)
        if self._cluster is not None and (self._dirty or self._shape != shape):
            self.remove_cluster()
        if self._cluster is not None and not self._mend(attached):
            self.remove_cluster()
        for last in (False,) * (_STARTS - 1) + (True,):
            if self._cluster is not None:
                return
            self._shape, self._dirty = shape, False
            try:
                self.start_cluster()
            except Exception:  # of Ray, on a machine that is too busy to start it in time
                self.remove_cluster()
                if last:
                    raise

    def spoil(self) -> None:
        """The next run gets a new cluster."""
        self._dirty = True

    def start_cluster(self) -> None:
        """Starts the nodes, and the endpoint of an attached shape."""
        from ray.cluster_utils import Cluster
        from ray.experimental import internal_kv

        assert self._shape is not None
        nodes, attached = self._shape
        if self._client_before is _UNKNOWN:
            self._client_before = internal_kv.internal_kv_get_gcs_client()
        head = {"num_cpus": _CPUS[nodes][0], "include_dashboard": False}
        handler = signal.getsignal(signal.SIGTERM)
        self._cluster = Cluster(
            initialize_head=True, head_node_args={**head, "object_store_memory": _STORE_BYTES}
        )
        for number in range(1, nodes):
            self.add_node(_CPUS[nodes][number])
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process without cleaning
        if attached:
            settings = {
                "name": _ENDPOINT,
                "engine": self.engine_options,
                "replicas": endpoint_replicas(nodes),
                "port": _free_port(),
            }
            if self._deploy(settings) != 0:
                log = (self.folder / "deploy.log").read_text()[-2000:]
                raise RuntimeError(f"the endpoint could not be deployed: {log}")

    def remove_cluster(self) -> None:
        """Ends every process of the cluster, at once."""
        from ray.experimental import internal_kv

        if self._cluster is None:
            return
        cluster, self._cluster = self._cluster, None
        for node in [*cluster.worker_nodes, cluster.head_node]:
            if node is not None:
                cluster.remove_node(node, allow_graceful=False)
        # A node makes its client that of this process. Whoever asks the head that is gone, as Serve
        # does in a later test's cluster, ends the process after a minute.
        if self._client_before in (None, _UNKNOWN):
            internal_kv._internal_kv_reset()
        else:
            internal_kv._initialize_internal_kv(self._client_before)

    def add_node(self, cpus: int = 2) -> None:
        """One more raylet."""
        self._cluster.add_node(num_cpus=cpus, object_store_memory=_STORE_BYTES)

    def kill_node(self, draw: random.Random) -> bool:
        """Kills a raylet that is not the head's; False where there is none."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))
        if nodes:
            self._cluster.remove_node(draw.choice(nodes), allow_graceful=False)
        return bool(nodes)

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
        return self._deploy({"name": _ENDPOINT if attached else None}) == 0

    def _deploy(self, settings: dict[str, object]) -> int | None:
        """Runs `deploy.py`; its exit code, None where it took too long."""
        log = self.folder / "deploy.log"
        address = {"RAY_ADDRESS": self.address}
        pid = self.forks.start(
            "tests.chaos.deploy", json.dumps(settings), log=log, environment=address
        )
        code = self.forks.wait(pid, _DEPLOY_SECONDS)
        if code is None:
            send(pid, signal.SIGKILL)
        return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _remove(folder: Path) -> None:
    """Removes a folder into which processes that are about to end still write."""
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(1.0)


def _restore(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)
