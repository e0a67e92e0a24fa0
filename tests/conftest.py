"""One real S3 server and one real local Ray for the whole session: `s3`, `local_ray`, `serving`.

It never attaches to a cluster that happens to run on the machine, and leaves nothing behind in
the home folder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import settings

if TYPE_CHECKING:
    from cluster.demo.local_s3 import LocalS3
    from cluster.serving.fleet import Fleet

# A slow machine is no failure: what hangs is ended by pytest-timeout.
# Generated inputs are the same in each run, so that a red run is the change's; `make search` has
# new ones.
settings.register_profile("repository", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("repository")

REPOSITORY = Path(__file__).resolve().parent.parent
_BUCKETS = itertools.count()

# Before anything imports Ray. Workers inherit the environment, and import test doubles by name.
os.environ.update(
    {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        # Ray's workers are polite by default: beside other work on the machine they would starve.
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
os.environ.pop("RAY_ADDRESS", None)
_paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in _paths if path)


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Jobs run in this process point the logs at the stderr of their test, which ends with it."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    """An S3 server in a process of its own; AWS_* point at it until the session ends."""
    from cluster.demo.local_s3 import LocalS3

    with LocalS3("first") as server:
        yield server


@pytest.fixture
def s3(s3_server: LocalS3) -> str:
    """The URI of a fresh, empty bucket."""
    name = f"bucket-{next(_BUCKETS)}"
    s3_server.create_bucket(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def local_ray(s3_server: LocalS3) -> Iterator[None]:
    """A Ray of our own: four logical CPUs, no dashboard. It starts after the S3 server, so that
    its workers inherit the AWS_* variables."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def serving(local_ray: None) -> str:
    """Serve on that Ray, on a free port; the value is the proxy's URL."""
    from cluster.serving.ray_session import http_root, join_serve, serve_details

    join_serve(host="127.0.0.1", port=None)
    details = serve_details()
    assert details is not None
    return http_root(details)


@pytest.fixture(scope="session")
def fleet(serving: str) -> Iterator[Fleet]:
    """One replica of the fake engine, with its HTTP edge, shared by the tests of the session."""
    from cluster.serving.application import FleetSettings
    from cluster.serving.engine_settings import EngineSettings
    from cluster.serving.fleet import open_fleet

    engine = EngineSettings(
        model="fake-model",
        engine="tests.cluster.fake_engine:FakeEngine",
        slots=4,
        options={"seconds": 0.05},
    )
    with open_fleet(FleetSettings(engine=engine)) as opened:
        yield opened
