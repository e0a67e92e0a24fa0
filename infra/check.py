"""Checks what operators deploy, offline, each by its own tool or schema: `make check-infra`.

Pods by the schemas of Kubernetes, Dockerfiles by hadolint, policies by parliament, alert rules by
promtool. Of KubeRay there is no schema to install: the fields of its resources are compared with
those of its API ray.io/v1, and its Serve config with what the endpoint takes. Exit code 1 names
what is wrong.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import yaml
from parliament import analyze_policy_string

INFRA: Final = Path(__file__).parent
KUBERNETES: Final = "1.31"
"""Whose schemas pods are checked by."""
_CLUSTER: Final = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
    "workerGroupSpecs", "suspend", "headServiceAnnotations", "gcsFaultToleranceOptions",
}  # fmt: skip
_HEAD: Final = {"serviceType", "headService", "enableIngress", "rayStartParams", "template"}
_WORKERS: Final = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams",
    "template", "scaleStrategy", "idleTimeoutSeconds",
}  # fmt: skip
_SPECS: Final = {
    "RayCluster": _CLUSTER,
    "RayService": {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy"},
    "RayJob": {
        "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished", "activeDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML",
        "submitterPodTemplate", "submitterConfig", "suspend", "metadata", "jobId",
    },
}  # fmt: skip


def main() -> int:
    """The exit code."""
    failed = 0
    for name, problems in checks():
        found = list(problems)
        print(f"{'FAILED' if found else 'ok':7} {name}")
        for problem in found:
            print(f"        {problem}")
        failed += bool(found)
    return int(failed > 0)


def checks() -> Iterator[tuple[str, Iterator[str]]]:
    """The name of each check, and what it finds wrong."""
    for path in sorted((INFRA / "kubernetes").glob("*.yaml")):
        yield str(path), check_ray(yaml.safe_load(path.read_text()))
    for path in sorted((INFRA / "docker").glob("Dockerfile")):
        yield str(path), _run("hadolint", str(path))
    for path in sorted((INFRA / "s3").glob("*.json")):
        yield str(path), check_policy(path.read_text())
    monitoring = INFRA / "monitoring"
    yield "alert rules", _run("promtool", "check", "rules", str(monitoring / "alerts.yaml"))
    yield "alerts fire", _run("promtool", "test", "rules", str(monitoring / "alerts_test.yaml"))
    yield (
        "prometheus.yaml",
        _run("promtool", "check", "config", str(monitoring / "prometheus.yaml")),
    )


def check_ray(resource: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a resource of KubeRay."""
    kind, spec = resource["kind"], resource["spec"]
    if resource["apiVersion"] != "ray.io/v1" or kind not in _SPECS:
        yield f"no resource of ray.io/v1: {kind}"
        return
    yield from _unknown(f"{kind}.spec", spec, _SPECS[kind])
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
    yield from _unknown("cluster", cluster, _CLUSTER)
    if cluster.get("authOptions") != {"mode": "token"}:
        yield "without authOptions.mode: token whoever reaches the dashboard runs code"
    yield from _unknown("headGroupSpec", cluster["headGroupSpec"], _HEAD)
    yield from _check_pod("head", cluster["headGroupSpec"]["template"])
    for group in cluster["workerGroupSpecs"]:
        yield from _unknown(group["groupName"], group, _WORKERS)
        yield from _check_pod(group["groupName"], group["template"])
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas are not between minReplicas and maxReplicas"
    if kind == "RayService":
        yield from _check_serve(yaml.safe_load(spec["serveConfigV2"]))


def _check_pod(name: str, template: dict[str, Any]) -> Iterator[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
    try:
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{name}: {error.message}"
    if not template["spec"].get("securityContext", {}).get("runAsNonRoot"):
        yield f"{name}: runs as root"


def _check_serve(config: dict[str, Any]) -> Iterator[str]:
    yield from _unknown("serve", config, {"proxy_location", "http_options", "applications"})
    taken = _endpoint_arguments()
    for application in config["applications"]:
        allowed = {"name", "import_path", "route_prefix", "args", "runtime_env"}
        yield from _unknown(application["name"], application, allowed)
        yield from _unknown("args", application["args"], taken)
        if config["http_options"]["host"] != "127.0.0.1" and "keys" not in application["args"]:
            yield "other machines can ask, and there are no keys"


def _endpoint_arguments() -> set[str]:
    """What the endpoint takes, read from its source: this environment has no Ray."""
    source = (INFRA.parent / "cluster" / "serving" / "application.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_ARGUMENTS":
            assert node.value is not None
            return set(ast.literal_eval(node.value))
    raise AssertionError("application.py names no arguments")


def check_policy(text: str) -> Iterator[str]:
    """What is wrong with an IAM policy."""
    for finding in analyze_policy_string(text).findings:
        yield f"{finding.issue}: {finding.detail} {finding.location}"
    for statement in json.loads(text)["Statement"]:
        if "*" in statement["Resource"] or any("*" in action for action in statement["Action"]):
            yield f"{statement['Sid']}: more than it needs"


def _unknown(place: str, given: dict[str, Any], known: set[str]) -> Iterator[str]:
    for name in sorted(set(given) - known):
        yield f"{place}: unknown field {name}"


def _run(*command: str) -> Iterator[str]:
    if shutil.which(command[0]) is None:
        yield f"{command[0]} is not installed"
        return
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        yield from (done.stdout + done.stderr).splitlines()


if __name__ == "__main__":
    sys.exit(main())
