"""Methods and budgets as a command line writes them: "sppruner,sppruner:kappa=0,random"."""

from __future__ import annotations

from collections.abc import Sequence

from sppruner import Budget, PruneSpec
from sppruner.errors import SpecError
from sppruner.selectors import selector_for


def parse_methods(text: str) -> list[PruneSpec]:
    """One spec per method, without its budget yet; "none" is left out, since dense always runs.

    Raises SpecError for an unknown method or option, which lists those there are.
    """
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        spec = PruneSpec.parse(entry, Budget(ratio=0.5))
        if not spec.is_dense:
            selector_for(spec)
            found.append(spec)
    return found


def parse_shares(text: str) -> list[float]:
    """Raises SpecError where something is not a number; `Budget` checks the range."""
    try:
        return [float(share) for share in text.split(",")]
    except ValueError as error:
        raise SpecError(f"--retain {text!r}: give shares such as 0.333,0.222") from error


def specs_of(methods: Sequence[PruneSpec], shares: Sequence[float]) -> list[PruneSpec]:
    """Every method at every budget, each once."""
    specs = [
        PruneSpec(method=method.method, budget=Budget(ratio=share), options=method.options)
        for method in methods
        for share in shares
    ]
    return list(dict.fromkeys(specs))
