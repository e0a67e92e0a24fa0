"""Whether the other nodes see the output and the corpus that this one sees, asked before anything
is labelled.

Where a drive is not mounted on the driver's node, its path leads to this node's own disk: a new run
would be planned there beside the one that the others see, and every unit written where nobody looks
for it. Where each node has a copy of the corpus of its own, as of an unfinished download, the
others would take its objects for changed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import ray
import structlog
from ray.exceptions import RayError
from rich.console import Console

from cluster.errors import ObjectGone, StoreError, UsageError
from cluster.other_node import other_nodes
from cluster.output.manifest import Manifest
from cluster.output.run_output import RunOutput
from cluster.store import ObjectInfo, Store, open_store

_Q = TypeVar("_Q")
_A = TypeVar("_A")

logger = structlog.get_logger(__name__)

_ANSWER_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 10.0


def check_shared(output: RunOutput, console: Console) -> None:
    """Raises UsageError where another node holds a manifest in the place of this run's. Warns where
    no other node sees this one. Nodes that do not answer are not waited for. Raises StoreError
    where the store does not answer here."""
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


def check_corpus(manifest: Manifest) -> None:
    """Raises UsageError where another node has other files in the corpus's place. One that has no
    such place takes no part in reading; nodes that do not answer are not waited for."""
    if "://" in manifest.source:
        return  # a service shows every node the same
    objects = manifest.identity.corpus
    seen = _ask_others(_holds, (open_store(manifest.source), [objects[0], objects[-1]]))
    others = sum(holds is False for holds in seen)
    if others:
        raise UsageError(
            f"{manifest.source} is another folder on {others} of {len(seen)} other nodes: the "
            f"corpus's {objects[0].key} or {objects[-1].key} is missing there, or has another size "
            "or date. Put the corpus on a drive that every node sees or at s3://bucket/prefix, or "
            "into a folder of its own that this node alone has"
        )


def _seen_elsewhere(output: RunOutput) -> list[bytes | None]:
    """The heads of the manifests that the other nodes see; None for a node that sees none."""
    return _ask_others(_look, output)


def _ask_others(look: Callable[[_Q], _A], question: _Q) -> list[_A]:
    """What the other nodes answer that do."""
    remote = ray.remote(look)
    asked = [
        remote.options(num_cpus=0, scheduling_strategy=node).remote(question)
        for node in other_nodes()
    ]
    if not asked:
        return []
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_SECONDS)
    seen: list[_A] = []
    for answer in answered:
        try:
            seen.append(ray.get(answer))
        except RayError as error:
            logger.warning("node_cannot_look", error=type(error).__name__)
    return seen


def _look(output: RunOutput) -> bytes | None:
    try:
        return output.manifest_head(patience_s=_LOOK_SECONDS)
    except StoreError as error:
        logger.warning("node_cannot_look", error=str(error))
        return None


def _holds(question: tuple[Store, list[ObjectInfo]]) -> bool | None:
    """Whether the store has these very objects here; None where the node does not see it."""
    store, objects = question
    if not store.is_here():
        return None
    store = store.with_patience(_LOOK_SECONDS)
    try:
        for info in objects:
            # Opened, since a network drive may answer for seconds with what a file was.
            store.get_range(info.key, 0, min(1, info.size), etag=info.etag)
    except ObjectGone:
        return False
    except StoreError as error:
        logger.warning("node_cannot_look", error=str(error))
        return None
    return True
