"""Join the Ray cluster and the Serve instance that are running, or start them.

A Ray that this process started ends with it; whatever was there before, and Serve, stay.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import ray
import structlog
from ray import serve
from ray.exceptions import ActorDiedError

# No public way to ask for the HTTP address, nor to drop a client without shutting Serve down.
from ray.serve.context import _get_global_client, _set_global_client
from ray.serve.schema import ServeInstanceDetails

from cluster.errors import FleetUnavailable
from cluster.logs import WORKER_HOOK
from cluster.termination import call_heard, handler_kept

logger = structlog.get_logger(__name__)

DEFAULT_PORT = 8000

SERVE_SETTINGS = threading.RLock()
"""Held while Serve's settings are made or read. Each of them registers a module with cloudpickle
for a moment, and where two threads do so at once, one fails: the thread that keeps a lease reads
them while another deploys."""

# Logical CPUs of a local Ray beside one for each replica: readers, labellers and sinks mostly wait
# for what runs the model, and on a small machine must still fit beside it.
_CPUS_BESIDE = 3
_PROBE_SECONDS = 1.0
_ANSWER_SECONDS = 10.0
_RAY_CONNECTS = "RAY_gcs_server_port_wait_time_s"  # of about 40 s each, where nobody answers
# A head that restarts listens again within this.
_LISTEN_SECONDS = 30.0


def join_ray(
    stack: ExitStack, environment: Mapping[str, str] | None = None, *, replicas: int = 1
) -> bool:
    """Connects to Ray: this process's connection, else RAY_ADDRESS, else the cluster that `ray
    start` started on this machine, else a new local one. Returns whether it started one.

    environment: variables for this job's workers. Everyone with access to the cluster sees them,
    so secrets belong on the nodes. replicas: that a new one has room for. SIGTERM raises Terminated
    from now on, unless this process has a handler of its own. Raises FleetUnavailable where
    RAY_ADDRESS does not answer, or none starts here.
    """
    if ray.is_initialized():
        return False
    with handler_kept():
        return _connect(stack, environment, replicas)


def _connect(stack: ExitStack, environment: Mapping[str, str] | None, replicas: int) -> bool:
    runtime = {**WORKER_HOOK, "env_vars": dict(environment or {})}
    stack.callback(_leave_ray)  # also of a Ray that was about to start when this process was ended
    named = os.environ.get("RAY_ADDRESS")
    address = named or _current_cluster()
    if address not in (None, "local"):
        _wait_until_it_listens(address)
        try:
            # Ray reads the note of `ray start` itself as "auto", and only then uses the token that
            # `ray start` made.
            with _asked_once():
                ray.init(
                    address=named or "auto", logging_level=logging.WARNING, runtime_env=runtime
                )
        except ConnectionError as error:
            raise FleetUnavailable(
                f"no Ray at {address}: {error}. Set RAY_ADDRESS to another one, or to local; a "
                "cluster with a token needs RAY_AUTH_MODE=token"
            ) from error
        return False
    try:
        ray.init(
            address="local",
            num_cpus=max(replicas + _CPUS_BESIDE, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.WARNING,
            runtime_env=runtime,
        )
    except RuntimeError as error:  # one of its processes did not come up
        raise FleetUnavailable(
            f"Ray did not start on this machine: {error}. Run it again; its logs are below "
            "/tmp/ray, or RAY_TMPDIR"
        ) from error
    logger.info("ray_started", cpus=ray.cluster_resources().get("CPU"))
    return True


def _wait_until_it_listens(address: str) -> None:
    """Raises FleetUnavailable where nothing listens at host:port. Ray itself asks for a quarter of
    an hour, and does not say what for. Addresses of another form are Ray's to understand."""
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdigit():
        return
    deadline = time.monotonic() + _LISTEN_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PROBE_SECONDS).close()
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline:
                raise FleetUnavailable(
                    f"no Ray at {address}: {error}. Set RAY_ADDRESS to the address that `ray "
                    "start` printed, or to local"
                ) from error
            time.sleep(_PROBE_SECONDS)
        else:
            return


@contextmanager
def _asked_once() -> Iterator[None]:
    """Lets Ray ask a head that listens no more for 40 s, and not twenty times as long: one that
    died since it was probed, perhaps while this process was stopped."""
    if _RAY_CONNECTS in os.environ:
        yield
        return
    os.environ[_RAY_CONNECTS] = "1"
    try:
        yield
    finally:
        del os.environ[_RAY_CONNECTS]


def _leave_ray() -> None:
    """Disconnects from the cluster and drops Serve's cached client of it.

    Serve reuses the client while the Ray job id stays the same, and every local cluster counts its
    jobs from 1: the next cluster of this process would be given the client of this one.
    """
    try:
        call_heard(ray.shutdown)
    finally:
        _set_global_client(None)


def _current_cluster() -> str | None:
    """The address that `ray start` noted on this machine, if something listens there: Ray itself
    retries for minutes. Its "auto" also finds the private cluster of any other process here, and
    loses it when that process ends."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not note.is_file():
        return None
    address = note.read_text().strip()
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS).close()
    except (OSError, ValueError):
        logger.info("stale_cluster_ignored", address=address, noted_in=str(note))
        return None
    return address


def join_serve(*, host: str, port: int | None) -> bool:
    """Uses the Serve instance of the cluster, or starts one. Returns whether it started one.

    It stays: others may have put applications on it, and empty it holds no CPU and no GPU. port:
    None for 8000, or a free one if 8000 is taken.
    """
    if serve_details() is not None:
        return False
    with _held_port(host) if port is None else nullcontext(port) as chosen:
        serve.start(  # which returns once it listens
            http_options={"host": host, "port": chosen},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
    logger.info("serve_started", host=host, port=chosen)
    return True


def serve_details() -> ServeInstanceDetails | None:
    """The state of Serve and its applications; None where Serve does not run. Raises
    GetTimeoutError where it runs and does not answer."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    question = client._controller.get_serve_instance_details.remote()
    try:
        details = ray.get(question, timeout=_ANSWER_SECONDS)
    except ActorDiedError:  # Serve was shut down, and the client kept
        _set_global_client(None)
        return None
    with SERVE_SETTINGS:
        return ServeInstanceDetails(**details)


def http_root(details: ServeInstanceDetails) -> str:
    """http://host:port of the proxy on this machine; empty if Serve runs without HTTP."""
    if details.http_options is None:
        return ""
    options = details.http_options
    host = "127.0.0.1" if options.host in ("0.0.0.0", None) else options.host
    return f"http://{host}:{options.port}"


@contextmanager
def _held_port(host: str) -> Iterator[int]:
    """8000, or a free port if it is taken, which no other job is given meanwhile. Serve would share
    a taken port: it listens with SO_REUSEPORT, and requests go to either process at random."""
    for port in (DEFAULT_PORT, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
            try:
                holder.bind((host, port))
            except OSError:
                continue
            # Nobody else had it. From now on Serve may bind it beside this socket, which does not
            # listen and gets no requests; whoever binds without that option, as above, may not.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            yield int(holder.getsockname()[1])
            return
    raise FleetUnavailable(f"no free port on {host}")
