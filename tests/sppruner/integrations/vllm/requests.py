"""Requests about drawn scenes, and what two engines must agree on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sppruner.engine import Request, Result, SamplingParams
from sppruner.evaluation.drawn_scenes import scene_questions
from sppruner.spec import DENSE, Budget, PruneSpec

SPECS = [
    DENSE,
    *(
        PruneSpec.parse(method, Budget(ratio=ratio))
        for method, ratio in [
            ("sppruner", 0.222),
            ("sppruner", 0.111),
            ("sppruner:kappa=0", 0.333),
            ("fsr", 0.222),
            ("visionzip", 0.222),
            ("prunesid", 0.222),
            ("cdpruner", 0.222),
            ("divprune", 0.222),
            ("random", 0.222),
            ("pool", 0.25),
        ]
    ),
]
"""Dense, and methods that read every signal, merge before and behind the projector, and select by
the question."""


def questions(count: int, spec: PruneSpec = DENSE, *, new_tokens: int = 12) -> list[Request]:
    """One question about each of so many scenes."""
    items = scene_questions(range(count)).items
    first: dict[str, Any] = {}
    for item in items:
        first.setdefault(item.group, item)
    return [
        Request(
            id=item.id,
            prompt=item.prompt,
            images=(item.image(),),
            spec=spec,
            generation=SamplingParams(max_new_tokens=new_tokens),
        )
        for item in first.values()
    ]


def facts(result: Result) -> Result:
    """What does not depend on who answered: all but time, and what caches spared."""
    cost = None if result.cost is None else replace(result.cost, flops_cached={})
    return replace(result, seconds=0.0, cost=cost)
