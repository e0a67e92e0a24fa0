"""What Serve runs, asked of its controller from an event loop: nothing blocks, or starts Serve.

Serve's own functions wait in the calling thread, and connect, which would start a Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import ray
from ray.exceptions import RayError

# No public way to ask without blocking.
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.schema import ReplicaState

_JOB_PREFIX: Final = "job-"
_ANSWER_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.2


def job_application(deployment: str) -> str:
    """What the application is called in which a job deploys replicas. Endpoints have names that
    people give them."""
    return f"{_JOB_PREFIX}{deployment}"


def is_job_application(name: str) -> bool:
    """Whether a job deployed the application: such a one is removed when no job uses it."""
    return name.startswith(f"{_JOB_PREFIX}vlm-")


async def live_replicas(app: str, deployment: str) -> int | None:
    """Replicas of a deployment that are up, 0 where it is not deployed or Serve does not run; None
    where Serve does not answer, so that nothing is known."""
    applications = await _applications()
    if applications is None:
        return None
    found = applications.get(app, {}).get("deployments", {}).get(deployment)
    return 0 if found is None else count_running(found["replicas"])


def count_running(replicas: Any) -> int:
    """How many of Serve's replica details, as plain values, are of replicas that are up."""
    return sum(replica["state"] == ReplicaState.RUNNING for replica in replicas)


async def application_names() -> list[str] | None:
    """The applications that exist, those that are being removed too; None where Serve does not
    answer."""
    applications = await _applications()
    return None if applications is None else list(applications)


async def remove_application(name: str, *, timeout_seconds: float) -> bool:
    """Removes an application with its replicas. False where it still exists after the timeout."""
    try:
        controller = _controller()
    except ValueError:
        return True
    await asyncio.wait_for(controller.delete_apps.remote([name]), _ANSWER_SECONDS)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    while loop.time() < deadline:
        names = await application_names()
        if names is not None and name not in names:
            return True
        await asyncio.sleep(_POLL_SECONDS)
    return False


async def _applications() -> Mapping[str, Any] | None:
    """By name, none where Serve does not run; None where it does not answer."""
    try:
        question = _controller().get_serve_instance_details.remote()
        details = await asyncio.wait_for(question, _ANSWER_SECONDS)
    except ValueError:
        return {}
    except (RayError, TimeoutError):
        return None
    applications: Mapping[str, Any] = details["applications"]
    return applications


def _controller() -> Any:
    """The handle of Serve's controller. Raises ValueError where Serve does not run, RayError where
    Ray does not say."""
    if not ray.is_initialized():  # to ask would start a Ray
        raise ValueError("Ray is not initialised here")
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
