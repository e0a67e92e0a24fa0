"""The checks of `make check-infra` find what they are for: each is shown something broken."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes_validate", reason="make check-infra")

from infra.check import check_policy, check_ray

INFRA = Path(__file__).parents[2] / "infra"
SERVICE: dict[str, Any] = yaml.safe_load((INFRA / "kubernetes" / "rayservice.yaml").read_text())
POLICY: dict[str, Any] = json.loads((INFRA / "s3" / "job-policy.json").read_text())


def cluster(resource: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = resource["spec"]["rayClusterConfig"]
    return found


def pod(resource: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = cluster(resource)["workerGroupSpecs"][1]["template"]["spec"]
    return found


def test_what_is_in_the_repository_is_right() -> None:
    assert list(check_ray(SERVICE)) == []
    assert list(check_policy(json.dumps(POLICY))) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: cluster(r).pop("authOptions"), "authOptions"),
        (lambda r: cluster(r).update(rayversion="1"), "unknown field rayversion"),
        (lambda r: r["spec"].update(serveConfig=""), "unknown field serveConfig"),
        (lambda r: pod(r)["containers"][0].update(imagePull="x"), "imagePull"),
        (lambda r: pod(r)["containers"][0]["resources"].update(limits=3), "gpu"),
        (lambda r: pod(r)["securityContext"].pop("runAsNonRoot"), "runs as root"),
        (lambda r: cluster(r)["workerGroupSpecs"][0].update(replicas=9), "not between"),
        (
            lambda r: r["spec"].update(
                serveConfigV2=r["spec"]["serveConfigV2"].replace("retain:", "retains:")
            ),
            "unknown field retains",
        ),
        (
            lambda r: r["spec"].update(
                serveConfigV2=r["spec"]["serveConfigV2"].replace("keys:", "dtype:")
            ),
            "there are no keys",
        ),
    ],
)
def test_a_broken_resource_is_found(damage: Callable[[dict[str, Any]], Any], said: str) -> None:
    resource = copy.deepcopy(SERVICE)
    damage(resource)
    assert any(said in problem for problem in check_ray(resource))


@pytest.mark.parametrize(
    "change", [{"Action": ["s3:*"]}, {"Resource": ["*"]}, {"Action": ["s3:NoSuchAction"]}]
)
def test_a_policy_that_allows_more_or_nothing_is_found(change: dict[str, Any]) -> None:
    policy = copy.deepcopy(POLICY)
    policy["Statement"][0] |= change
    assert list(check_policy(json.dumps(policy)))
