"""Whether the other nodes see the output that this one sees, asked before anything is labelled.

Where a drive is not mounted on the driver's node, its path leads to this node's own disk: a new run
would be planned there beside the one that the others see, and every unit written where nobody looks
for it.
"""

from __future__ import annotations

from typing import Final

import ray
import structlog
from ray.exceptions import RayError
from rich.console import Console

from cluster.errors import UsageError
from cluster.other_node import other_nodes
from cluster.output.run_output import RunOutput

logger = structlog.get_logger(__name__)

_ANSWER_SECONDS: Final = 60.0


def check_shared(output: RunOutput, console: Console) -> None:
    """Raises UsageError where another node holds a manifest in the place of this run's. Warns where
    no other node sees this one. Nodes that do not answer are not waited for."""
    seen = _seen_elsewhere(output)
    if not seen:
        return
    ours = output.manifest_head()
    others = sum(head is not None and head != ours for head in seen)
    if others:
        raise UsageError(
            f"{output.uri} holds another run, or the same one planned at another time, on {others} "
            f"of {len(seen)} other nodes: a drive is mounted there and not here, or each node has "
            "a folder of this name. Mount it on every node, or give s3://bucket/prefix or another "
            "--output"
        )
    if ours not in seen:
        advice = (
            "are the AWS_* variables set there, too?"
            if output.uri.startswith("s3://")
            else "this one writes all units. A shared drive is not mounted here, or not there"
        )
        console.print(
            f"no other node sees {output.uri}: {advice}",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _seen_elsewhere(output: RunOutput) -> list[bytes | None]:
    """The heads of the manifests that the other nodes see; None for a node that sees none."""
    look = ray.remote(_look)
    asked = [look.options(num_cpus=0, scheduling_strategy=n).remote(output) for n in other_nodes()]
    if not asked:
        return []
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_SECONDS)
    seen: list[bytes | None] = []
    for answer in answered:
        try:
            seen.append(ray.get(answer))
        except RayError as error:
            logger.warning("node_cannot_look", error=type(error).__name__)
    return seen


def _look(output: RunOutput) -> bytes | None:
    return output.manifest_head()
