"""`ray up ray_cluster.yaml` accepts the file: Ray's own preparation and validation run on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

util = pytest.importorskip("ray.autoscaler._private.util", reason="Ray moved a private module")

FILE = Path(__file__).parents[1] / "ray_cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def accepted(config: dict[str, Any]) -> dict[str, Any]:
    prepared = util.prepare_config(copy.deepcopy(config))
    util.validate_config(prepared)
    return prepared


def test_ray_accepts_the_cluster_file(config: dict[str, Any]) -> None:
    prepared = accepted(config)
    assert prepared["available_node_types"]["gpu"]["resources"]["GPU"] == 1


def test_ray_would_have_noticed_a_broken_file(config: dict[str, Any]) -> None:
    config["head_node_type"] = "no-such-type"
    with pytest.raises(ValueError, match="head_node_type"):
        accepted(config)


def test_nodes_that_ask_for_a_token_have_it(config: dict[str, Any]) -> None:
    """With RAY_AUTH_MODE=token `ray start` refuses to run where ~/.ray/auth_token is missing."""
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert sum("RAY_AUTH_MODE=token ray start" in command for command in commands) == 2
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_a_head_whose_workers_have_a_role_has_one_that_may_pass_it(config: dict[str, Any]) -> None:
    """Ray's default role of a head may not pass a role to the nodes it starts."""
    for node in config["available_node_types"].values():
        assert "Name" in node["node_config"]["IamInstanceProfile"]


def test_one_number_is_the_size_of_the_fleet(config: dict[str, Any]) -> None:
    assert config["max_workers"] == config["available_node_types"]["gpu"]["max_workers"]


def test_the_image_runs_the_locked_ray(config: dict[str, Any]) -> None:
    lock = (FILE.parent / "requirements.lock").read_text().splitlines()
    version = next(line.split("==")[1] for line in lock if line.startswith("ray=="))
    assert f":{version}-py311" in config["docker"]["image"]
