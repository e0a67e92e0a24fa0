"""A spec together with the method it names, checked against one model: done once per request."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Final, TypeAlias

from sppruner.capabilities import Capabilities
from sppruner.errors import MissingSignal
from sppruner.relevance import require_source
from sppruner.selectors import Selector, selector_for
from sppruner.spec import DENSE, PruneSpec
from sppruner.types import RelevanceSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSpec:
    """A spec that its model can run, as `Pruner.resolve` gives it."""

    spec: PruneSpec
    """The spec as the request named it."""

    selector: Selector | None
    """The method with its options, as it runs on the model; None for dense."""


AnySpec: TypeAlias = PruneSpec | ResolvedSpec
"""A spec, resolved or not; one that is resolved is neither built nor checked again."""

RESOLVED_DENSE: Final = ResolvedSpec(spec=DENSE, selector=None)


def selector_on(spec: PruneSpec, can: Capabilities) -> Selector | None:
    """A spec's method as it runs on a model, its "auto" options decided; None for dense."""
    selector = selector_for(spec)
    return None if selector is None else selector.resolve_for(can)


def resolve_spec(
    spec: PruneSpec, can: Capabilities, *, sources: Container[RelevanceSource] = ("embed",)
) -> ResolvedSpec:
    """The spec with its method, after every check that needs no weights.

    sources: where text relevance can come from. A model comes with its tokenizer, which is enough
    for "embed", but not with a CLIP text tower. Raises UnknownMethod, SpecError (a bad option or
    budget) or MissingSignal (a signal, position policy or relevance source that is not available).
    """
    selector = selector_on(spec, can)
    if selector is None:
        return ResolvedSpec(spec=spec, selector=None)
    missing = selector.signals - can.signals
    if missing:
        raise MissingSignal(f"method {spec.method!r} needs {', '.join(sorted(missing))}: not {can}")
    if spec.positions not in can.positions:
        raise MissingSignal(f"positions {spec.positions!r} cannot run on {can}")
    selector.check(spec.budget, can)
    require_source(selector.relevance_source, sources)
    return ResolvedSpec(spec=spec, selector=selector)
