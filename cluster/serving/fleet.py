"""Attach to the replicas that serve a model, or deploy them.

The replica deployment's name carries a fingerprint of model, engine settings and code, so jobs find
an endpoint that `serve run cluster:endpoint model=PATH replicas=2` started, whatever its
application is called. Each job holds a lease: what jobs deployed is removed with the last one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import ray
import structlog
from ray import serve
from ray.exceptions import GetTimeoutError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import (
    ApplicationDetails,
    ApplicationStatus,
    ReplicaState,
    ServeInstanceDetails,
)

from cluster.errors import FleetUnavailable
from cluster.serving.application import FleetSettings, application, has_gpu
from cluster.serving.fleet_lease import FleetLease
from cluster.serving.ray_session import (
    SERVE_SETTINGS,
    http_root,
    join_ray,
    join_serve,
    serve_details,
)
from cluster.serving.replica import ReplicaStats

logger = structlog.get_logger(__name__)

_USABLE: Final = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING)
_POLL_SECONDS: Final = 0.5
_REPORT_SECONDS: Final = 15.0
# As often the start timeout may a replica take that has its place: weights come through slow links.
_WHILE_LOADING: Final = 4
_STATS_TIMEOUT_SECONDS: Final = 30.0
# Applications in a Ray that this process started for them, of which it holds the lease until that
# Ray ends, for all jobs that it runs meanwhile.
_IN_OWN_RAY: Final[set[str]] = set()


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
    """Replicas that were up when it was opened; more join, and some die, as long as it is used
    (`cluster.serving.serve_state.live_replicas`)."""
    target_replicas: int
    """Replicas that Serve keeps up where there is room."""
    slots: int
    """Requests that each replica answers at once."""
    kv_token_capacity: int | None
    """Tokens of prompts and answers that the KV caches of `replicas` hold together; None for no
    bound."""
    model: str
    """Folder or Hub name."""
    model_revision: str
    """Content hash or commit."""
    image_backend: str
    """"pil" or "torchvision"."""
    dtype: str
    """Of the weights, such as "float32"."""
    deployed_here: bool
    """Whether this process deployed it."""

    def stats(self) -> FleetStats:
        """Counters of the replicas that answer now. Raises FleetUnavailable where none does."""
        return _sum_stats(_query_stats(self.handle))


@contextmanager
def open_fleet(settings: FleetSettings) -> Iterator[Fleet]:
    """Replicas for this model. At least one is up and answers; the others join as they come.

    Raises FleetUnavailable with the reason where not one came up in time."""
    with ExitStack() as stack:
        own_ray = join_ray(stack, settings.environment, replicas=settings.replicas)
        lease = None
        if settings.app not in _IN_OWN_RAY:  # else this process holds it already, until Ray ends
            lease = stack.enter_context(
                FleetLease(
                    settings.app,
                    patience_seconds=settings.start_timeout_seconds,
                    release=not own_ray,
                )
            )
        if own_ray:
            _IN_OWN_RAY.add(settings.app)
            stack.callback(_IN_OWN_RAY.discard, settings.app)
        name, deployed_here = _find_or_deploy(settings, lease)
        app = _wait(name, settings)
        logger.info("fleet_up", app=app.name, attached=not deployed_here)
        if lease is not None and name == settings.app:
            # On a CPU in place of a GPU, or the other way, its answers would be others.
            again = replace(settings, gpu=_runs_on_gpu(app, settings.name))
            lease.after_each_beat(partial(_redeploy_if_gone, again, lease))
        yield _fleet(app, settings.name, deployed_here=deployed_here)


def _find_or_deploy(settings: FleetSettings, lease: FleetLease | None) -> tuple[str, bool]:
    """The name of the application, and whether this process deployed it."""
    deadline = time.monotonic() + settings.start_timeout_seconds
    reason = "other jobs kept deploying"
    while True:
        try:
            found = _find(settings)
            if found is not None:
                return found, False
            if _deploy_alone(settings, lease):
                return settings.app, True
        except GetTimeoutError:
            reason = "Serve's controller did not answer"
        if time.monotonic() > deadline:
            raise FleetUnavailable(
                f"{reason} for {settings.start_timeout_seconds:.0f} s: try again"
            )
        time.sleep(_POLL_SECONDS)


def _deploy_alone(settings: FleetSettings, lease: FleetLease | None) -> bool:
    """Deploys the application if nobody else deploys one now. False: look for it again."""
    try:
        if lease is not None and not lease.claim_deployment():
            return False
        try:
            join_serve(host=settings.host, port=settings.port)
            if _find(settings) is not None:  # somebody deployed it a moment ago
                return False
            _deploy(settings)
        finally:
            if lease is not None:
                lease.deployed()
    except (RayError, RayServeException, GetTimeoutError) as error:
        raise FleetUnavailable(f"{settings.engine.model} could not be deployed: {error}") from error
    return True


def _redeploy_if_gone(settings: FleetSettings, lease: FleetLease) -> None:
    """Deploys again what was removed while this job used it: the janitor took the job for dead, as
    it slept or was cut off. Its calls go on where a replica is up."""
    if _find(settings) is None and _deploy_alone(settings, lease):
        logger.warning("fleet_redeployed", app=settings.app)


def _find(settings: FleetSettings) -> str | None:
    """The application that has this deployment and is up or coming up."""
    details = serve_details()
    applications = {} if details is None else details.applications
    ours = applications.get(settings.app)
    # Just deployed, it has no deployments yet; unhealthy, its replicas are being replaced.
    if ours is not None and ours.status in (*_USABLE, ApplicationStatus.UNHEALTHY):
        return ours.name
    for app in applications.values():
        if settings.name in app.deployments and app.status in _USABLE:
            return app.name
    return None


def _deploy(settings: FleetSettings) -> None:
    details = serve_details()
    assert details is not None
    if len(ray.nodes()) > 1 and not has_gpu():
        logger.warning("no_gpu_is_up", app=settings.app, replicas_run_on="CPUs")
    others = [app for name, app in details.applications.items() if name != settings.app]
    route = f"/{settings.app}" if any(app.route_prefix == "/" for app in others) else "/"
    with SERVE_SETTINGS:
        target = serve.RunTarget(
            target=application(settings), name=settings.app, route_prefix=route, logging_config=None
        )
        serve.run_many(
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


def _wait(name: str, settings: FleetSettings) -> ApplicationDetails:
    """The application once one of its replicas runs; else why none does."""
    started = reported = time.monotonic()
    placed = False
    while True:
        try:
            details = serve_details()
        except GetTimeoutError:
            details = None
        app = details.applications.get(name) if details else None
        if app is not None and _answers(app, settings.name):
            return app
        reason = "" if app is None else _reason(app)
        if app is not None and app.status is ApplicationStatus.DEPLOY_FAILED:
            raise FleetUnavailable(f"{settings.engine.model} could not be served:\n{reason}")
        now = time.monotonic()
        nodes = _placed_on(app, settings.name)
        # For good: Serve may be silent for a moment, or replace a replica that loads.
        placed = placed or bool(nodes)
        patience = settings.start_timeout_seconds * (_WHILE_LOADING if placed else 1)
        if now - started > patience:
            raise FleetUnavailable(
                f"{settings.engine.model} was not up after {patience:.0f} s: "
                + (
                    f"still loading on {', '.join(nodes)}. Look at the replica's log there"
                    if nodes
                    else f"{reason or 'no replica could be placed'}. Give the cluster more GPUs or "
                    f"CPUs{_name_others(details, settings.name)}"
                )
            )
        if now - reported > _REPORT_SECONDS:
            reported = now
            logger.info(
                "fleet_starting",
                app=name,
                seconds=round(now - started),
                message=reason,
                loading_on=nodes,
            )
        time.sleep(_POLL_SECONDS)


def _placed_on(app: ApplicationDetails | None, deployment: str) -> list[str]:
    """Addresses of the nodes on which replicas of the model load it, or run: the HTTP edge comes up
    behind them."""
    found = None if app is None else app.deployments.get(deployment)
    return sorted(
        {
            replica.node_ip or "an unknown node"
            for replica in (found.replicas if found else ())
            if replica.state in (ReplicaState.STARTING, ReplicaState.RUNNING) and replica.node_id
        }
    )


def _name_others(details: ServeInstanceDetails | None, deployment: str) -> str:
    """What else serves models here, and may be what somebody meant this job to attach to."""
    others = [
        app.name
        for app in ([] if details is None else details.applications.values())
        if any(name.startswith("vlm-") and name != deployment for name in app.deployments)
    ]
    if not others:
        return ""
    return (
        f", or end {', '.join(sorted(others))}, which serves another model, with other settings, "
        "or with other code than this job has"
    )


def _runs_on_gpu(app: ApplicationDetails, deployment: str) -> bool:
    return bool(app.deployments[deployment].deployment_config.ray_actor_options.num_gpus)


def _answers(app: ApplicationDetails, deployment: str) -> bool:
    """Whether a replica of every deployment is up: of the model's, and of the HTTP edge."""
    return deployment in app.deployments and all(
        any(replica.state is ReplicaState.RUNNING for replica in found.replicas)
        for found in app.deployments.values()
    )


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
        target_replicas=app.deployments[deployment].target_num_replicas,
        slots=replicas[0].slots,
        kv_token_capacity=(
            None if None in capacities else sum(n for n in capacities if n is not None)
        ),
        model=replicas[0].model,
        model_revision=replicas[0].model_revision,
        image_backend=replicas[0].image_backend,
        dtype=replicas[0].dtype,
        deployed_here=deployed_here,
    )


def _query_stats(handle: DeploymentHandle[Any]) -> Sequence[ReplicaStats]:
    """Counters of the replicas that answer. Raises FleetUnavailable where none does in time."""
    deadline = time.monotonic() + _STATS_TIMEOUT_SECONDS
    while True:
        try:
            answers: Sequence[object] = handle.broadcast("stats").results(
                timeout_s=max(0.0, deadline - time.monotonic()), return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError) as error:
            answers = [error]  # the router knows no replica at the moment, or none answered
        stats = [answer for answer in answers if isinstance(answer, ReplicaStats)]
        if stats:
            return stats
        if time.monotonic() >= deadline:
            raise FleetUnavailable(f"no replica answers: {answers}")
        time.sleep(_POLL_SECONDS)


def _sum_stats(replicas: Sequence[ReplicaStats]) -> FleetStats:
    return FleetStats(
        replicas=tuple(replicas),
        rows=sum(r.rows for r in replicas),
        busy_seconds=sum(r.busy_seconds for r in replicas),
        uptime_seconds=sum(r.uptime_seconds for r in replicas),
    )
