"""The whole service on one machine: `make local`, until Ctrl-C.

An S3-speaking server, a Ray head, the endpoint, Prometheus where Debian's package is installed, and
Grafana where Docker runs. Everything listens on this machine alone. Arguments are the endpoint's,
as `model=NAME prune=sppruner`; default: the embedded model. Jobs started with the variables that
are printed share its replicas.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Final

from cluster.demo.local_s3 import LocalS3
from cluster.logs import configure_logs

INFRA: Final = Path(__file__).parents[1]
DEFAULT: Final = ("model=tiny-llava", "prune=sppruner", "retain=0.222")
_START_SECONDS: Final = 600.0
_STOP_SECONDS: Final = 20.0


class StackError(Exception):
    """A part of the stack did not start, or ended."""


class LocalStack:
    """Starts the parts on entry, ends them in reverse order on exit."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = [*(arguments or DEFAULT)]
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._open = ExitStack()
        self.places: dict[str, str] = {}
        """What there is, and where."""
        self.variables: dict[str, str] = {}
        """Of the environment of a job that shares it."""

    def __enter__(self) -> LocalStack:
        with ExitStack() as stack:
            self._start_all(stack)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def check(self) -> None:
        """Raises StackError for a part that has ended."""
        for name, process in self._parts.items():
            if process.poll() is not None:
                raise StackError(f"{name} ended with status {process.returncode}")

    def _start_all(self, stack: ExitStack) -> None:
        s3 = stack.enter_context(LocalS3("corpus"))
        s3.create_bucket("labels")
        self.places["S3"] = s3.endpoint
        port, dashboard, http = free_port(6379), free_port(8265), free_port(8000)
        metrics = free_port(8080)
        environment = os.environ | s3.environment | {"RAY_AUTH_MODE": "token"}
        environment.pop("RAY_ADDRESS", None)
        generated = [_tool("ray"), "get-auth-token", "--generate"]
        subprocess.run(generated, env=environment, check=True, stdout=subprocess.DEVNULL)
        head = ["start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
        head += [f"--metrics-export-port={metrics}"]
        address = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        self._start(stack, "ray", [_tool("ray"), *head, "--node-ip-address=127.0.0.1"], environment)
        self._wait_for_port("ray", port)
        self.variables = s3.environment | address | {"RAY_AUTH_MODE": "token"}
        self.places["Ray's dashboard"] = f"http://127.0.0.1:{dashboard}"
        self._serve(stack, environment | address, http)
        self.places["Metrics"] = f"http://127.0.0.1:{metrics}/metrics"
        self._watch(stack, environment, metrics)

    def _serve(self, stack: ExitStack, environment: dict[str, str], port: int) -> None:
        arguments = dict(argument.split("=", 1) for argument in self._arguments)
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [
                {
                    "name": "endpoint",
                    "import_path": "cluster:endpoint",
                    "route_prefix": "/",
                    "args": arguments,
                }
            ],
        }
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sppruner-")))
        (folder / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
        command = [_tool("serve"), "run", str(folder / "serve.yaml")]
        self._start(stack, "endpoint", command, environment)
        self._wait_for("endpoint", f"http://127.0.0.1:{port}/readyz")
        self.places["Endpoint and page"] = f"http://127.0.0.1:{port}"

    def _watch(self, stack: ExitStack, environment: dict[str, str], metrics: int) -> None:
        if shutil.which("prometheus") is None:
            self.places["Prometheus"] = "not installed: apt-get install prometheus"
            return
        port = free_port(9090)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sppruner-")))
        config = {
            "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
            "rule_files": [str(INFRA / "monitoring" / "alerts.yaml")],
            "scrape_configs": [
                {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{metrics}"]}]}
            ],
        }
        (folder / "prometheus.yaml").write_text(json.dumps(config))
        command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        self._start(stack, "prometheus", command, environment)
        self._wait_for("prometheus", f"http://127.0.0.1:{port}/-/ready")
        self.places["Prometheus"] = f"http://127.0.0.1:{port}"
        if port == 9090 and _runs("docker", "info"):  # Grafana's data source names that port
            grafana = ["docker", "run", "--rm", "--network=host", "--name=sppruner-grafana"]
            grafana += [
                "-e",
                "GF_SERVER_HTTP_ADDR=127.0.0.1",
                "-e",
                "GF_AUTH_ANONYMOUS_ENABLED=true",
            ]
            for source, target in (
                (INFRA / "local" / "grafana" / "provisioning", "/etc/grafana/provisioning"),
                (INFRA / "monitoring", "/dashboards"),
            ):
                grafana += ["-v", f"{source}:{target}:ro"]
            self._start(stack, "grafana", [*grafana, "grafana/grafana-oss:12.1.0"], environment)
            self.places["Grafana"] = "http://127.0.0.1:3000/d/sppruner"

    def _start(
        self, stack: ExitStack, name: str, command: Sequence[str], environment: dict[str, str]
    ) -> None:
        # In a group of its own: Ctrl-C is this process's, which ends the parts in order.
        process = subprocess.Popen(
            command, env=environment, stdout=sys.stderr, start_new_session=True, cwd=INFRA.parent
        )
        self._parts[name] = process
        stack.callback(_end, process)

    def _wait_for_port(self, name: str, port: int) -> None:
        def opened() -> bool:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                return False
            return True

        self._wait(name, opened)

    def _wait_for(self, name: str, url: str) -> None:
        def answered() -> bool:
            try:
                with urllib.request.urlopen(url, timeout=5) as response:
                    return bool(response.status == 200)
            except (OSError, urllib.error.URLError):
                return False

        self._wait(name, answered)

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise StackError(f"{name} did not start in {_START_SECONDS:.0f} s")
            time.sleep(0.5)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 once it was stopped, 1 where a part ended by itself."""
    configure_logs()  # to stderr
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        with LocalStack(arguments) as stack:
            for name, place in stack.places.items():
                print(f"{name:18} {place}")
            print("Jobs beside it:    " + " ".join(f"{k}={v}" for k, v in stack.variables.items()))
            print(
                "                   python jobs/caption_corpus.py --input s3://corpus/… --output s3://labels/…"
            )
            print("ready; Ctrl-C ends it", flush=True)
            while True:
                time.sleep(1)
                stack.check()
    except KeyboardInterrupt:
        return 0
    except StackError as error:
        print(error, file=sys.stderr)
        return 0 if stopped.is_set() else 1


def free_port(wanted: int) -> int:
    """The port that is wanted, or another where that one is taken."""
    for port in (wanted, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as listener:
                found: int = listener.getsockname()[1]
                return found
        except OSError:
            continue
    raise StackError("no port is free")


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _runs(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and what it has started."""
    for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
