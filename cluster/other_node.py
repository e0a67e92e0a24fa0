"""Work for another node of the cluster: what this one lacks, a mount or memory, that may have."""

from __future__ import annotations

import random

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def another_node() -> NodeAffinitySchedulingStrategy | None:
    """Places a task on any other node that lives; None where there is none, and outside Ray. If
    the node dies meanwhile the task runs wherever there is room."""
    if not ray.is_initialized():
        return None
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    return NodeAffinitySchedulingStrategy(random.choice(others), soft=True) if others else None
