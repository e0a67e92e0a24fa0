"""What a request asks of the pruner: a budget and a spec. Plain values, importable without torch,
since every process of a cluster handles them and few run a model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from sppruner.errors import SpecError

Positions: TypeAlias = Literal["keep", "renumber"]
OptionValue: TypeAlias = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many visual tokens of one image stay: a share of them, or a number of them.

    Exactly one of `ratio` (0..1] and `tokens` (≥ 0) is set. `min_keep` bounds a ratio from below,
    so that a tiny image does not lose all its tokens by rounding.
    """

    ratio: float | None = None
    tokens: int | None = None
    min_keep: int = 1

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.tokens is None):
            raise SpecError("a budget is either a ratio or a number of tokens: give exactly one")
        if self.ratio is not None:
            if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float):
                raise SpecError(f"budget ratio {self.ratio!r} is not a number")
            if not 0.0 < self.ratio <= 1.0:
                raise SpecError(
                    f"budget ratio {self.ratio!r} is outside (0, 1]: 0.222 keeps 22.2 %"
                )
            # 1 and 1.0 are one budget, so they must also be written alike.
            object.__setattr__(self, "ratio", float(self.ratio))
        for name, number in (("tokens", self.tokens), ("min_keep", self.min_keep)):
            if number is not None and (type(number) is not int or number < 0):
                raise SpecError(f"budget {name} {number!r} is not a whole number from 0")

    def count(self, n: int) -> int:
        """Tokens kept out of `n`. A pure function of `n`, so a prompt's length is known early.

        Ratios round to the nearest token: 0.222 of 576 is 128, as in the papers' tables.
        """
        if self.tokens is not None:
            return min(n, self.tokens)
        assert self.ratio is not None
        return min(n, max(self.min_keep, math.floor(self.ratio * n + 0.5)))


DENSE_BUDGET = Budget(ratio=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSpec:
    """What a request asks of the pruner. Hashable, and written beside every result.

    method: a name from `sppruner.selectors.available()`, or "none" for dense.
    positions: "keep" leaves every kept token at its original position (pruned equals masked);
        "renumber" closes the gaps, as the original LLaVA-based codes do.
    options: keyword arguments of the method, e.g. {"relevance": "none"}; checked by the method.
    """

    method: str
    budget: Budget = DENSE_BUDGET
    positions: Positions = "keep"
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise SpecError(f"method {self.method!r} is not a name")
        if self.positions not in ("keep", "renumber"):
            raise SpecError(f"positions {self.positions!r}: use 'keep' or 'renumber'")
        if not isinstance(self.options, Mapping):
            raise SpecError(f"options {self.options!r} is not a mapping of names to values")
        for name, value in self.options.items():
            if not isinstance(value, bool | int | float | str):
                raise SpecError(f"option {name}={value!r} is not a bool, number or string")
            if isinstance(value, float) and not math.isfinite(value):
                raise SpecError(f"option {name}={value!r} is not finite: JSON cannot hold it")
        # A private copy in key order: equal specs print, hash and group alike.
        object.__setattr__(self, "options", dict(sorted(self.options.items())))
        if self.method == "none" and self.budget != DENSE_BUDGET:
            raise SpecError(
                "method 'none' keeps every token: leave the budget out, or name a method"
            )

    # Equal means written alike: 1, 1.0 and True are equal in a dict, but different in JSON.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PruneSpec):
            return NotImplemented
        return self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def is_dense(self) -> bool:
        return self.method == "none"

    def to_dict(self) -> dict[str, Any]:
        budget = {k: getattr(self.budget, k) for k in ("ratio", "tokens", "min_keep")}
        return {
            "method": self.method,
            "budget": {k: v for k, v in budget.items() if v is not None},
            "positions": self.positions,
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruneSpec:
        """The inverse of `to_dict`; unknown keys are errors. Raises SpecError."""
        unknown = set(data) - {"method", "budget", "positions", "options"}
        if unknown or "method" not in data:
            raise SpecError(f"not a prune spec: unknown keys {sorted(unknown)}, or no method")
        try:
            budget = Budget(**data["budget"]) if "budget" in data else DENSE_BUDGET
        except TypeError as error:
            raise SpecError(f"not a budget: {data['budget']!r}") from error
        return cls(
            method=data["method"],
            budget=budget,
            positions=data.get("positions", "keep"),
            options=data.get("options", {}),
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this spec in results and caches."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


DENSE = PruneSpec(method="none")
