"""Work for another node of the cluster: what this one lacks, a mount or memory, that may have."""

from __future__ import annotations

import random
from collections.abc import Sequence

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def other_nodes() -> Sequence[NodeAffinitySchedulingStrategy]:
    """Places tasks on each other node that lives, in random order; empty where there is none, and
    outside Ray. If the node dies meanwhile the task runs wherever there is room."""
    if not ray.is_initialized():
        return ()
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    random.shuffle(others)
    return [NodeAffinitySchedulingStrategy(node, soft=True) for node in others]
