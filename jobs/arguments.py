"""Arguments that several commands share: --methods ("sppruner,sppruner:kappa=0,random"), --retain,
and the files for results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sppruner import Budget, PruneSpec
from sppruner.errors import EvaluationError, SpecError
from sppruner.selectors import selector_for


def parse_methods(text: str) -> list[PruneSpec]:
    """One spec per method, with a placeholder budget; "none" is dropped: dense always runs.

    Raises SpecError, with the valid names, for an unknown method or option.
    """
    if not text.strip(" ,"):
        raise SpecError("no method is named: give some, such as sppruner,random")
    specs = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        spec = PruneSpec.parse(entry, Budget(ratio=0.5))
        if not spec.is_dense:
            selector_for(spec)
            specs.append(spec)
    return specs


def parse_shares(text: str) -> list[float]:
    """Comma-separated numbers. Raises SpecError for anything else; `Budget` checks the range."""
    try:
        return [float(share) for share in text.split(",")]
    except ValueError as error:
        raise SpecError(f"--retain {text!r}: give shares such as 0.333,0.222") from error


def check_folders(*files: Path | None) -> None:
    """Raises EvaluationError for a file that cannot be written where it is to be: better than
    after hours of measuring."""
    for file in files:
        if file is None:
            continue
        if not file.absolute().parent.is_dir():
            raise EvaluationError(f"{file}: its folder does not exist; make it first")
        if file.is_dir():
            raise EvaluationError(f"{file} is a folder: name a file")


def combine_specs(methods: Sequence[PruneSpec], shares: Sequence[float]) -> list[PruneSpec]:
    """Every method at every budget, without duplicates."""
    specs = [
        PruneSpec(method=method.method, budget=Budget(ratio=share), options=method.options)
        for method in methods
        for share in shares
    ]
    return list(dict.fromkeys(specs))
