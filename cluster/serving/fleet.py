"""Attach to the replicas that serve a model, or deploy them and remove them on exit.

The replica deployment's name carries a fingerprint of model and engine settings, so jobs find an
endpoint that `serve run cluster:endpoint model=PATH replicas=2` started, whatever its application
is called. The process that deployed an application removes it: two jobs that are to share one
attach to a long-lived endpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationDetails, ApplicationStatus

from cluster.errors import FleetUnavailable
from cluster.serving.application import FleetSettings, application
from cluster.serving.ray_session import http_root, join_ray, join_serve, serve_details
from cluster.serving.replica import ReplicaStats

logger = structlog.get_logger(__name__)

_POLL_SECONDS: Final = 0.5
_REPORT_SECONDS: Final = 15.0
_STATS_TIMEOUT_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStats:
    """The replicas' counters, summed. They count compute, retries included, not commits."""

    replicas: tuple[ReplicaStats, ...]
    """Each replica's own."""
    rows: int
    """Rows answered."""
    busy_seconds: float
    """Seconds in which engines worked."""
    uptime_seconds: float
    """Seconds since replicas were built."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fleet:
    """Replicas that are up."""

    app: str
    """Name of the Serve application."""
    deployment: str
    """Name of the replicas' deployment in it."""
    http_url: str
    """Root of the HTTP edge; only the route prefix if Serve runs without HTTP."""
    handle: DeploymentHandle[Any]
    """Handle of the deployment."""
    replicas: int
    """Replicas that answered."""
    slots: int
    """Requests that each replica answers at once."""
    kv_token_capacity: int | None
    """Tokens of prompts and answers that all KV caches hold together; None for no bound."""
    model: str
    """Folder or Hub name."""
    model_revision: str
    """Content hash or commit."""
    image_backend: str
    """"pil" or "torchvision"."""
    deployed_here: bool
    """Whether this process deployed it, and will remove it."""

    def stats(self) -> FleetStats:
        """Counters of every replica as of now. Raises TimeoutError if one does not answer."""
        return _sum_stats(_query_stats(self.handle))


@contextmanager
def open_fleet(settings: FleetSettings) -> Iterator[Fleet]:
    """Replicas for this model, up and answering. Raises FleetUnavailable with the reason."""
    with ExitStack() as stack:
        own_ray = join_ray(stack, settings.environment)
        # A Ray of our own takes Serve and the application down with it, faster than one by one.
        parts = ExitStack() if own_ray else stack
        join_serve(parts, host=settings.host, port=settings.port)
        found = _find(settings.name)
        if found is None:
            _deploy(settings, parts)
        app = _wait(found or settings.name, settings)
        logger.info("fleet_up", app=app.name, attached=found is not None)
        yield _fleet(app, settings.name, deployed_here=found is None)


def _find(deployment: str) -> str | None:
    """The application that has this deployment and is up or coming up."""
    details = serve_details()
    assert details is not None
    usable = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING)
    for app in details.applications.values():
        if deployment in app.deployments and app.status in usable:
            return app.name
    return None


def _deploy(settings: FleetSettings, stack: ExitStack) -> None:
    details = serve_details()
    assert details is not None
    others = [app for name, app in details.applications.items() if name != settings.name]
    route = f"/{settings.name}" if any(app.route_prefix == "/" for app in others) else "/"
    target = serve.RunTarget(
        target=application(settings), name=settings.name, route_prefix=route, logging_config=None
    )
    stack.callback(serve.delete, settings.name)
    serve.run_many(
        [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )


def _wait(name: str, settings: FleetSettings) -> ApplicationDetails:
    """The application once it runs; else why it does not."""
    started = reported = time.monotonic()
    while True:
        details = serve_details()
        app = details.applications.get(name) if details else None
        if app is not None and app.status is ApplicationStatus.RUNNING:
            return app
        reason = "" if app is None else _reason(app)
        if app is not None and app.status is ApplicationStatus.DEPLOY_FAILED:
            raise FleetUnavailable(f"{settings.engine.model} could not be served:\n{reason}")
        now = time.monotonic()
        if now - started > settings.start_timeout_seconds:
            raise FleetUnavailable(
                f"{settings.engine.model} was not up after {settings.start_timeout_seconds:.0f} s: "
                f"{reason or 'no replica could be placed'}. Ask for fewer replicas, or give the "
                "cluster more GPUs or CPUs."
            )
        if now - reported > _REPORT_SECONDS:
            reported = now
            logger.info("fleet_starting", app=name, seconds=round(now - started), message=reason)
        time.sleep(_POLL_SECONDS)


def _reason(app: ApplicationDetails) -> str:
    """What Serve says of the application and its deployments; constructor errors are in there."""
    texts = [app.message, *(deployment.message for deployment in app.deployments.values())]
    return "\n".join(text for text in texts if text)


def _fleet(app: ApplicationDetails, deployment: str, *, deployed_here: bool) -> Fleet:
    details = serve_details()
    assert details is not None
    handle: DeploymentHandle[Any] = serve.get_deployment_handle(deployment, app.name)
    replicas = _query_stats(handle)
    capacities = [replica.kv_token_capacity for replica in replicas]
    return Fleet(
        app=app.name,
        deployment=deployment,
        http_url=(http_root(details) + (app.route_prefix or "")).rstrip("/"),
        handle=handle,
        replicas=len(replicas),
        slots=replicas[0].slots,
        kv_token_capacity=(
            None if None in capacities else sum(n for n in capacities if n is not None)
        ),
        model=replicas[0].model,
        model_revision=replicas[0].model_revision,
        image_backend=replicas[0].image_backend,
        deployed_here=deployed_here,
    )


def _query_stats(handle: DeploymentHandle[Any]) -> Sequence[ReplicaStats]:
    answers: list[ReplicaStats] = handle.broadcast("stats").results(
        timeout_s=_STATS_TIMEOUT_SECONDS
    )
    return answers


def _sum_stats(replicas: Sequence[ReplicaStats]) -> FleetStats:
    return FleetStats(
        replicas=tuple(replicas),
        rows=sum(r.rows for r in replicas),
        busy_seconds=sum(r.busy_seconds for r in replicas),
        uptime_seconds=sum(r.uptime_seconds for r in replicas),
    )
