"""Join the Ray cluster and the Serve instance that run already, or start them.

Each function registers on the caller's ExitStack how to stop what it started, and nothing else.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import ExitStack

import ray
import structlog
from ray import serve
from ray.serve.context import _get_global_client  # no public way to ask for the HTTP address
from ray.serve.schema import ServeInstanceDetails

from cluster.errors import FleetUnavailable
from cluster.logs import WORKER_HOOK

logger = structlog.get_logger(__name__)

DEFAULT_PORT = 8000


def join_ray(stack: ExitStack) -> bool:
    """Uses this process's connection, else RAY_ADDRESS, else a cluster on this machine, else
    starts a local one. Returns whether it started one. Raises FleetUnavailable."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS", "")
    if address != "local":
        try:
            ray.init(
                address=address or "auto", logging_level=logging.WARNING, runtime_env=WORKER_HOOK
            )
        except ConnectionError as error:
            if address:
                raise FleetUnavailable(
                    f"RAY_ADDRESS={address}: {error}. Unset it to use a local Ray."
                ) from error
        else:
            stack.callback(ray.shutdown)
            return False
    # RAY_ADDRESS=local means the same to Ray, and would win over the argument if it were unset.
    ray.init(
        address="local",
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env=WORKER_HOOK,
    )
    stack.callback(ray.shutdown)
    logger.info("ray_started", cpus=ray.cluster_resources().get("CPU"))
    return True


def join_serve(stack: ExitStack, *, host: str, port: int | None) -> bool:
    """Uses the Serve instance of the cluster, or starts it. Returns whether it started one."""
    if serve_details() is not None:
        return False
    chosen = _free_port(host) if port is None else port
    serve.start(
        http_options={"host": host, "port": chosen},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    stack.callback(serve.shutdown)
    logger.info("serve_started", host=host, port=chosen)
    return True


def serve_details() -> ServeInstanceDetails | None:
    """Everything Serve knows of itself, or None where it does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else ServeInstanceDetails(**client.get_serve_details())


def http_root(details: ServeInstanceDetails) -> str:
    """http://host:port of the proxy on this machine; empty if Serve runs without HTTP."""
    if details.http_options is None:
        return ""
    options = details.http_options
    host = "127.0.0.1" if options.host in ("0.0.0.0", None) else options.host
    return f"http://{host}:{options.port}"


def _free_port(host: str) -> int:
    """8000, or a free one if it is taken. Serve itself would share the port with a stranger: it
    listens with SO_REUSEPORT, so that requests would go to either at random."""
    for port in (DEFAULT_PORT, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise FleetUnavailable(f"no free port on {host}")
