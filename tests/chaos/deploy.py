"""Deploys the endpoint of an attached cluster, as `serve run` does, or removes what runs left.

    python -m tests.chaos.deploy SETTINGS

SETTINGS is JSON: name, engine options, replicas, port to deploy; name alone to clean: every other
application is removed, and exit code 0 means that the named one, if any, is whole.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Final

import ray
from ray import serve

from cluster.serving.application import FleetSettings, application
from cluster.serving.engine_settings import EngineSettings
from sppruner.models.loading import EMBEDDED, resolve_model
from tests.chaos.driver import fake

_UP_SECONDS: Final = 90.0


def main(argv: list[str]) -> int:
    """Connects, deploys or cleans; 0 if the endpoint is up, where there is to be one."""
    given = json.loads(argv[0])
    ray.init(log_to_driver=False, logging_level="ERROR")
    if "engine" in given:
        engine = EngineSettings(model=EMBEDDED, revision=resolve_model(EMBEDDED).revision)
        settings = fake(FleetSettings(engine=engine, replicas=given["replicas"]), given["engine"])
        serve.start(
            http_options={"host": "127.0.0.1", "port": given["port"]}, proxy_location="HeadOnly"
        )
        serve.run(application(settings), name=given["name"], route_prefix="/")
        return 0
    if given["name"] is None:
        serve.shutdown()
        return 0
    for name in serve.status().applications:
        if name != given["name"]:
            serve.delete(name)
    return 0 if _is_up(given["name"]) else 1


def _is_up(name: str) -> bool:
    """Whether the application runs, within a minute or so: its replicas may have been killed."""
    deadline = time.monotonic() + _UP_SECONDS
    while time.monotonic() < deadline:
        found = serve.status().applications.get(name)
        if found is None:
            return False
        states = [deployment.status for deployment in found.deployments.values()]
        if found.status == "RUNNING" and all(state == "HEALTHY" for state in states):
            return True
        time.sleep(0.3)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
