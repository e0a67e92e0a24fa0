"""Answers to a control block as a replica at an even pace gives them."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.protocol import BlockAnswers
from sppruner.engine.interface import Result


def even_block(
    pruned: list[Result], dense: list[Result] | None, *, discarded_seconds: float = 0.0
) -> BlockAnswers:
    """A block whose answers came one after the other, each after its `seconds`; one that was
    spoiled without `dense`."""
    both = _answered(pruned) & _answered(dense or [])
    return BlockAnswers(
        pruned=pruned,
        dense=dense,
        pruned_steady={result.id: result.seconds for result in pruned if result.id in both},
        dense_steady={result.id: result.seconds for result in dense or [] if result.id in both},
        discarded_seconds=discarded_seconds,
    )


def _answered(results: Sequence[Result]) -> set[str]:
    return {result.id for result in results if result.error_code is None}
