"""The Serve application of one model: HTTP edge and replicas."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import ray
from ray import serve

from cluster.errors import UsageError
from cluster.logs import LOG_FORMAT_VARIABLE, LOG_LEVEL_VARIABLE
from cluster.protocol import VERSION, rows_held
from cluster.serving.code_version import code_version
from cluster.serving.engine_settings import (
    VLLM,
    EngineSettings,
    check_vllm,
    gpus_of,
    parse_options,
)
from cluster.serving.http.api_keys import read_keys
from cluster.serving.http.app import Api, ApiSettings
from cluster.serving.http.image_fetch import AllowedPrefix
from cluster.serving.ray_session import SERVE_SETTINGS
from cluster.serving.replica import VLMReplica
from cluster.serving.serve_state import job_application
from sppruner.adapters import capabilities
from sppruner.errors import SpprunerError
from sppruner.integrations.vllm.settings import check_spec as check_spec_in_vllm
from sppruner.models.loading import load_config, resolve_model
from sppruner.pruner import check_spec
from sppruner.selectors import selector_for
from sppruner.spec import DENSE, Budget, PruneSpec

ONLINE_REQUESTS: Final = 32
"""Online requests that a replica accepts beside batch rows, which it bounds by `rows_held`."""
_N = TypeVar("_N", int, float)
_QUEUED_CALLS: Final = 512
_EDGE_REQUESTS: Final = 4096
_QUIET: Final = {"log_level": "WARNING", "enable_access_log": False}
_ARGUMENTS: Final = {
    "model", "replicas", "max_batch_rows", "revision", "dtype", "prune", "retain", "auto", "engine",
    "engine_options", "hosts", "origins", "keys", "public", "fetch",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """What to serve and where. All but `engine`, `start_timeout_seconds` and `environment` apply
    only to what `open_fleet` starts itself."""

    engine: EngineSettings
    """Model and engine of every replica."""
    replicas: int = 1
    """Replicas, one GPU each if the cluster has any."""
    gpu: bool | None = None
    """Whether each needs one; None: if the cluster has any."""
    threads: int | None = None
    """Torch threads of a CPU replica; None divides the machine's cores."""
    api: ApiSettings = field(default_factory=ApiSettings)
    """The HTTP edge."""
    host: str = "127.0.0.1"
    """Address of the HTTP edge."""
    port: int | None = None
    """Port of the HTTP edge; None is 8000, or a free one if 8000 is taken."""
    start_timeout_seconds: float = 900.0
    """Longest wait until the first replica runs; four times that where one has its place and loads
    the model."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for Ray's workers, if this process is not connected to Ray yet."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise UsageError(f"replicas {self.replicas}: give at least 1")

    @property
    def name(self) -> str:
        """The deployment's name: equal for equal models, engine settings and code."""
        return f"vlm-{fingerprint(self.engine)}"

    @property
    def app(self) -> str:
        """The application's name, if a job deploys it."""
        return job_application(self.name)


def fingerprint(engine: EngineSettings) -> str:
    """A hash of the code and of the settings that change answers; slots, device and threads do
    not. Replicas of another code might answer otherwise, or not understand what is asked."""
    local = os.path.isdir(engine.model)
    settings = {
        "protocol": VERSION,
        "code": code_version(),
        "model": os.path.realpath(engine.model) if local else engine.model,
        "revision": engine.revision,
        "engine": engine.engine,
        "dtype": engine.dtype,
        "options": dict(engine.options),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def has_gpu() -> bool:
    """Whether any node of the cluster that is up has a GPU."""
    return ray.is_initialized() and bool(ray.cluster_resources().get("GPU"))


def application(settings: FleetSettings) -> serve.Application:
    """HTTP edge and replicas, which get a GPU each if the cluster has any."""
    gpus = int(has_gpu() if settings.gpu is None else settings.gpu)
    engine = settings.engine.sized(gpu=gpus > 0)
    with SERVE_SETTINGS:
        return _application(settings, engine, gpus)


def _application(settings: FleetSettings, engine: EngineSettings, gpus: int) -> serve.Application:
    assert engine.slots is not None
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus * gpus_of(engine.options)}
    process = _log_environment()
    replica = serve.deployment(VLMReplica).options(
        name=settings.name,
        num_replicas=settings.replicas,
        ray_actor_options=options | process,
        max_ongoing_requests=rows_held(engine.slots) + ONLINE_REQUESTS,
        max_queued_requests=_QUEUED_CALLS,
        # Of all replicas together: before one is up, so many failed starts are a failed fleet.
        max_constructor_retry_count=2 * settings.replicas,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10.0,
        logging_config=_QUIET,
    )
    edge = serve.deployment(serve.ingress()(Api)).options(
        name="api",
        ray_actor_options={"num_cpus": 0} | process,
        # Of these the edge works on `max_requests`: whoever sends a body slowly, or asks whether it
        # is alive, takes none of those places.
        max_ongoing_requests=_EDGE_REQUESTS,
        max_queued_requests=_QUEUED_CALLS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10.0,
        logging_config=_QUIET,
    )
    threads = settings.threads or replica_threads(settings.replicas, gpus=gpus)
    most = max(settings.api.max_requests, ONLINE_REQUESTS * settings.replicas)
    api = replace(settings.api, replicas=settings.replicas, max_requests=most)
    return edge.bind(replica.bind(engine, threads=threads, watched=True), api)


def _log_environment() -> dict[str, Any]:
    """How logs are written, for processes that do not inherit our environment."""
    names = (LOG_FORMAT_VARIABLE, LOG_LEVEL_VARIABLE)
    given = {name: os.environ[name] for name in names if name in os.environ}
    return {"runtime_env": {"env_vars": given}} if given else {}


def replica_threads(replicas: int, *, gpus: float) -> int | None:
    """Torch threads of one of `replicas` replicas; None, torch's default, for one with a GPU."""
    return None if gpus else max(1, (os.cpu_count() or 1) // replicas)


def endpoint(args: Mapping[str, Any]) -> serve.Application:
    """The application that `serve run cluster:endpoint model=PATH …` deploys.

    Arguments: model; replicas; max_batch_rows (slots of a replica); revision; dtype; prune and
    retain (the pruning of requests that ask for none themselves); auto=true (prune those only
    where pruning is measured, at start-up, to be faster than dense); engine=vllm, and its
    engine_options (NAME=VALUE, comma-separated); hosts (names under which it may be asked, beside
    localhost and addresses) and origins (of web pages that may ask), comma-separated; keys (path or
    URI of the file of API keys), without which other machines are refused, unless public=true;
    fetch (prefixes of URLs from which images are fetched, comma-separated; none by default). In a
    config of Serve numbers, booleans and lists may be written as YAML has them.

    The model is pinned to its present content, as a job pins it, so that jobs find the endpoint.
    Raises UsageError for other arguments, and for a pruning that the model cannot run.
    """
    args = {name: _as_text(value) for name, value in args.items() if value is not None}
    if "model" not in args or set(args) - _ARGUMENTS:
        raise UsageError(f"arguments {sorted(args)}: give model=PATH, and of {sorted(_ARGUMENTS)}")
    if "retain" in args and "prune" not in args:
        raise UsageError(f"retain={args['retain']} prunes nothing: add prune=METHOD")
    if "keys" in args:
        read_keys(args["keys"])  # what is wrong with them is said now, and not in a log
    by_vllm = args.get("engine") == "vllm"
    if "engine" in args and not by_vllm:
        raise UsageError(f"engine={args['engine']}: write vllm, or leave it out")
    options = parse_options(filter(None, args.get("engine_options", "").split(",")))
    if by_vllm:
        check_vllm(options)
    try:
        retain = Budget(ratio=_number(args, "retain", float) or 0.222)
        spec = PruneSpec.parse(args["prune"], retain) if "prune" in args else DENSE
        selector_for(spec)  # a misspelt method must not cost the download of a model
        api = ApiSettings(
            default_spec=spec,
            auto=_is_true(args, "auto"),
            keys=args.get("keys"),
            public=_is_true(args, "public"),
            access_log=True,
            hosts=_names(args, "hosts"),
            origins=_names(args, "origins"),
            fetch=_names(args, "fetch"),
        )
        for prefix in api.fetch:
            AllowedPrefix.parse(prefix)
        pinned = resolve_model(args["model"], args.get("revision"))
        check = check_spec_in_vllm if by_vllm else check_spec
        check(spec, capabilities(load_config(pinned)))
    except SpprunerError as error:
        raise UsageError(str(error)) from error
    engine = EngineSettings(
        model=args["model"],
        revision=pinned.revision,
        slots=_number(args, "max_batch_rows", int),
        dtype=args.get("dtype", "auto"),
        options=options,
    )
    if by_vllm:
        engine = replace(engine, engine=VLLM)
    replicas = _number(args, "replicas", int) or 1
    return application(FleetSettings(engine=engine, replicas=replicas, api=api))


def _as_text(value: Any) -> str:
    """An argument of a Serve config as the command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def _is_true(args: Mapping[str, str], name: str) -> bool:
    value = args.get(name, "false")
    if value not in ("true", "false"):
        raise UsageError(f"{name}={value}: write true or false")
    return value == "true"


def _names(args: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in args.get(name, "").split(",") if part.strip())


def _number(args: Mapping[str, str], name: str, kind: type[_N]) -> _N | None:
    """The argument as a number above 0; None where it is not given."""
    if name not in args:
        return None
    try:
        value = kind(args[name])
    except ValueError as error:
        raise UsageError(f"{name}={args[name]}: give a number") from error
    if not value > 0:
        raise UsageError(f"{name}={args[name]}: give a number above 0")
    return value
