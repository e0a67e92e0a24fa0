"""Attach to the replicas that serve this model, or deploy them; on exit stop what was started.

The replica deployment's name carries a fingerprint of model and engine settings, so jobs find an
endpoint that was started by `serve run cluster.serving.fleet:build model=PATH replicas=2`,
whatever its application is called. Who deployed an application removes it: two jobs that are to
share one should both attach to a long-lived endpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import structlog
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationDetails, ApplicationStatus

from cluster.errors import FleetUnavailable, UsageError
from cluster.runs.admission import rows_held
from cluster.serving.http.app import Api, ApiSettings
from cluster.serving.ray_session import http_root, join_ray, join_serve, serve_details
from cluster.serving.replica import EngineSettings, ReplicaStats, VLMReplica
from sppruner.models.loading import resolve_model
from sppruner.spec import DENSE, Budget, PruneSpec

logger = structlog.get_logger(__name__)

# Slots that batch calls cannot take: they are refused above `rows_held`.
ONLINE_SLOTS = 32
_QUEUED_CALLS = 512
_POLL_SECONDS = 0.5
_REPORT_SECONDS = 15.0
_STATS_TIMEOUT_SECONDS = 30.0
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """What to serve and where. `replicas`, `threads`, `api`, `host` and `port` count only for what
    this fleet starts itself. threads: torch threads of a replica; None shares out a CPU's cores.
    Port None takes 8000, or a free one if 8000 is taken. `environment`: variables for Ray's
    workers, if this process is not connected to Ray yet."""

    engine: EngineSettings
    replicas: int = 1
    threads: int | None = None
    api: ApiSettings = field(default_factory=ApiSettings)
    host: str = "127.0.0.1"
    port: int | None = None
    start_timeout_seconds: float = 900.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise UsageError(f"replicas {self.replicas}: give at least 1")

    @property
    def name(self) -> str:
        """The deployment's name, and the application's if it is deployed here: equal for equal
        models and engine settings."""
        return f"vlm-{fingerprint(self.engine)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStats:
    """The replicas' counters, summed. Compute done, retries included; not what was committed."""

    replicas: tuple[ReplicaStats, ...]
    rows: int
    busy_seconds: float
    uptime_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fleet:
    """Replicas that are up. slots: slots of each. kv_token_capacity: tokens, of prompts and
    answers, that all of them may hold together; None where nothing bounds them."""

    app: str
    deployment: str
    http_url: str
    handle: DeploymentHandle[Any]
    replicas: int
    slots: int
    kv_token_capacity: int | None
    model: str
    model_revision: str
    image_backend: str
    deployed_here: bool

    def stats(self) -> FleetStats:
        """Asks every replica now. Raises TimeoutError if one does not answer."""
        return _summed(_ask(self.handle))


def fingerprint(engine: EngineSettings) -> str:
    """Names the settings that change answers; batch size, device and threads do not."""
    local = os.path.isdir(engine.model)
    settings = {
        "model": os.path.realpath(engine.model) if local else engine.model,
        "revision": engine.revision,
        "engine": engine.engine,
        "dtype": engine.dtype,
        "options": dict(engine.options),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def application(settings: FleetSettings) -> serve.Application:
    """The Serve application: HTTP edge and replicas, which get a GPU each if there are any."""
    gpus = 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else 0
    engine = settings.engine.sized(gpu=gpus > 0)
    assert engine.slots is not None
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
    replica = serve.deployment(VLMReplica).options(
        name=settings.name,
        num_replicas=settings.replicas,
        ray_actor_options=options,
        max_ongoing_requests=rows_held(engine.slots) + ONLINE_SLOTS,
        max_queued_requests=_QUEUED_CALLS,
        max_constructor_retry_count=2,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10.0,
        logging_config=_QUIET,
    )
    edge = serve.deployment(serve.ingress()(Api)).options(
        name="api",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4 * ONLINE_SLOTS,
        max_queued_requests=_QUEUED_CALLS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10.0,
        logging_config=_QUIET,
    )
    threads = settings.threads or replica_threads(settings.replicas, gpus=gpus)
    api = replace(settings.api, replicas=settings.replicas)
    return edge.bind(replica.bind(engine, threads=threads), api)


def replica_threads(replicas: int, *, gpus: float) -> int | None:
    """Torch threads of a replica with so many GPUs beside others; None: torch's default."""
    return None if gpus else max(1, (os.cpu_count() or 1) // replicas)


def build(args: Mapping[str, str]) -> serve.Application:
    """For `serve run cluster.serving.fleet:build model=PATH [replicas=N] [max_batch_rows=N]
    [revision=R] [dtype=D] [prune=METHOD retain=0.222 auto=true]`; prune sets the default of online
    requests, and auto applies it only where it is measured, at start-up, to be faster than dense.

    The model is pinned to what it is now, as a job pins it: that is how the job finds it.
    """
    known = {"model", "replicas", "max_batch_rows", "revision", "dtype", "prune", "retain", "auto"}
    if "model" not in args or set(args) - known:
        raise UsageError(f"arguments {sorted(args)}: give model=PATH, and of {sorted(known)}")
    auto = args.get("auto", "false")
    if auto not in ("true", "false"):
        raise UsageError(f"auto={auto}: write true or false")
    retain = Budget(ratio=float(args.get("retain", "0.222")))
    spec = PruneSpec.parse(args["prune"], retain) if "prune" in args else DENSE
    api = ApiSettings(default_spec=spec, auto=auto == "true")
    pinned = resolve_model(args["model"], args.get("revision"))
    engine = EngineSettings(
        model=args["model"],
        revision=pinned.revision,
        slots=int(args["max_batch_rows"]) if "max_batch_rows" in args else None,
        dtype=args.get("dtype", "auto"),
    )
    return application(
        FleetSettings(engine=engine, replicas=int(args.get("replicas", "1")), api=api)
    )


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
    begun = reported = time.monotonic()
    while True:
        details = serve_details()
        app = details.applications.get(name) if details else None
        if app is not None and app.status is ApplicationStatus.RUNNING:
            return app
        reason = "" if app is None else _reason(app)
        if app is not None and app.status is ApplicationStatus.DEPLOY_FAILED:
            raise FleetUnavailable(f"{settings.engine.model} could not be served:\n{reason}")
        now = time.monotonic()
        if now - begun > settings.start_timeout_seconds:
            raise FleetUnavailable(
                f"{settings.engine.model} was not up after {settings.start_timeout_seconds:.0f} s: "
                f"{reason or 'no replica could be placed'}. Ask for fewer replicas, or give the "
                "cluster more GPUs or CPUs."
            )
        if now - reported > _REPORT_SECONDS:
            reported = now
            logger.info("fleet_starting", app=name, seconds=round(now - begun), message=reason)
        time.sleep(_POLL_SECONDS)


def _reason(app: ApplicationDetails) -> str:
    """What Serve says of the application and its deployments; constructor errors are in there."""
    texts = [app.message, *(deployment.message for deployment in app.deployments.values())]
    return "\n".join(text for text in texts if text)


def _fleet(app: ApplicationDetails, deployment: str, *, deployed_here: bool) -> Fleet:
    details = serve_details()
    assert details is not None
    handle: DeploymentHandle[Any] = serve.get_deployment_handle(deployment, app.name)
    replicas = _ask(handle)
    rooms = [replica.kv_token_capacity for replica in replicas]
    return Fleet(
        app=app.name,
        deployment=deployment,
        http_url=(http_root(details) + (app.route_prefix or "")).rstrip("/"),
        handle=handle,
        replicas=len(replicas),
        slots=replicas[0].slots,
        kv_token_capacity=None
        if None in rooms
        else sum(room for room in rooms if room is not None),
        model=replicas[0].model,
        model_revision=replicas[0].model_revision,
        image_backend=replicas[0].image_backend,
        deployed_here=deployed_here,
    )


def _ask(handle: DeploymentHandle[Any]) -> Sequence[ReplicaStats]:
    answers: list[ReplicaStats] = handle.broadcast("stats").results(
        timeout_s=_STATS_TIMEOUT_SECONDS
    )
    return answers


def _summed(replicas: Sequence[ReplicaStats]) -> FleetStats:
    return FleetStats(
        replicas=tuple(replicas),
        rows=sum(r.rows for r in replicas),
        busy_seconds=sum(r.busy_seconds for r in replicas),
        uptime_seconds=sum(r.uptime_seconds for r in replicas),
    )
