"""The registry of methods: builds a spec's method and checks its options before the model runs."""

from __future__ import annotations

import functools

from sppruner.errors import UnknownMethod
from sppruner.selectors.base import Selector
from sppruner.selectors.baselines import GridSelector, RandomSelector, TopKSelector
from sppruner.selectors.cdpruner import CDPrunerSelector
from sppruner.selectors.divprune import DivPruneSelector
from sppruner.selectors.fastv import FastVSelector
from sppruner.selectors.fsr import FSRSelector
from sppruner.selectors.pool import PoolSelector
from sppruner.selectors.prunesid import PruneSIDSelector
from sppruner.selectors.pyramiddrop import PyramidDropSelector
from sppruner.selectors.sppruner import SPprunerSelector
from sppruner.selectors.visionzip import VisionZipSelector
from sppruner.selectors.vispruner import VisPrunerSelector
from sppruner.spec import PruneSpec

_SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (
        SPprunerSelector,
        RandomSelector,
        GridSelector,
        TopKSelector,
        FSRSelector,
        PruneSIDSelector,
        DivPruneSelector,
        VisionZipSelector,
        VisPrunerSelector,
        CDPrunerSelector,
        PoolSelector,
        FastVSelector,
        PyramidDropSelector,
    )
}


def available() -> list[str]:
    """The names of all methods, "none" included."""
    return ["none", *sorted(_SELECTORS)]


@functools.lru_cache(maxsize=1024)
def selector_for(spec: PruneSpec) -> Selector | None:
    """The method that `spec` names; None for dense. Raises UnknownMethod or SpecError."""
    if spec.is_dense:
        return None
    if spec.method not in _SELECTORS:
        raise UnknownMethod(
            f"no pruning method {spec.method!r}; there are {', '.join(available())}"
        )
    return _SELECTORS[spec.method].from_options(dict(spec.options))


__all__ = ["Selector", "available", "selector_for"]
