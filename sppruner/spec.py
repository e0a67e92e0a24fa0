"""Budgets and prune specs: what a request wants pruned. Plain values, importable without torch,
since every process of a cluster handles them and few run a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from sppruner.errors import SpecError

Positions: TypeAlias = Literal["keep", "renumber"]
"""The policy for position ids of kept tokens, see `PruneSpec.positions`."""

Scope: TypeAlias = Literal["image", "prompt"]
"""What a budget applies to, see `Budget.scope`."""

OptionValue: TypeAlias = bool | int | float | str
"""The value of a method's option."""


_INT_BOUND = 2**63  # of a column of integers, and far above any count


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` split in proportion to `sizes` by largest remainder; on a tie, earlier ones first.

    No share exceeds its size. The shares sum to `total`, or to the sum of `sizes` if that is less.
    """
    whole = sum(sizes)
    if total >= whole:
        return list(sizes)
    floors = [total * size // whole for size in sizes]
    by_rest = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for i in by_rest[: total - sum(floors)]:
        floors[i] += 1
    return floors


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many visual tokens are kept: a share or a number of them.

    Raises SpecError unless exactly one of `ratio` and `tokens` is set and all are within bounds.
    """

    ratio: float | None = None
    """Share of the tokens, in (0, 1]; None where `tokens` is set."""

    tokens: int | None = None
    """Number of tokens, from 0; None where `ratio` is set."""

    min_keep: int = 1
    """Fewest tokens that a ratio keeps, from 0, so that a tiny image does not lose all of them by
    rounding."""

    scope: Scope = "image"
    """Whether each image has this budget ("image"), or the images of a prompt share it by their
    token counts ("prompt")."""

    spread: float = 0.0
    """Share, in [0, 1), by which an image may get more or less than its part, with a method that
    measures how much information an image holds (PruneSID); 0 keeps counts exact."""

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.tokens is None):
            raise SpecError("a budget is either a ratio or a number of tokens: give exactly one")
        for name in ("ratio", "spread"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SpecError(f"budget {name} {value!r} is not a number")
            try:
                # 1 and 1.0 are one budget, so both must give the same JSON.
                object.__setattr__(self, name, float(value))
            except OverflowError as error:
                raise SpecError(f"budget {name} is far too large") from error
        if self.ratio is not None and not 0.0 < self.ratio <= 1.0:
            raise SpecError(f"budget ratio {self.ratio!r} is outside (0, 1]: 0.222 keeps 22.2 %")
        if not 0.0 <= self.spread < 1.0:
            raise SpecError(f"budget spread {self.spread!r} is outside [0, 1): 0.5 is ± half")
        if self.scope not in ("image", "prompt"):
            raise SpecError(f"budget scope {self.scope!r}: use 'image' or 'prompt'")
        for name, number in (("tokens", self.tokens), ("min_keep", self.min_keep)):
            if number is None and name == "tokens":
                continue
            if type(number) is not int or not 0 <= number < _INT_BOUND:
                raise SpecError(f"budget {name} {number!r} is not a whole number from 0")

    def count(self, n: int) -> int:
        """Tokens kept of `n`. A pure function of `n`, so that a prompt's length is known early.

        Ratios round to the nearest token: 0.222 of 576 is 128, as in the papers' tables.
        """
        if self.tokens is not None:
            return min(n, self.tokens)
        assert self.ratio is not None
        return min(n, max(self.min_keep, math.floor(self.ratio * n + 0.5)))

    def per_image(self, sizes: Sequence[int]) -> list[int]:
        """Tokens kept of each image of one prompt, given the images' token counts."""
        if self.scope == "prompt":
            return shares(self.count(sum(sizes)), sizes)
        return [self.count(n) for n in sizes]

    def reweighted(self, k: int, n: int, weight: float) -> int:
        """`k` of `n` tokens times `weight`, which is an image's information relative to its usual
        value, bounded by `spread`; to the nearest token, and not below `min_keep`."""
        low, high = 1.0 - self.spread, 1.0 + self.spread
        least = min(k, self.min_keep)
        return min(n, max(least, math.floor(k * min(high, max(low, weight)) + 0.5)))

    def bounds(self, n: int, images: int = 1) -> tuple[int, int]:
        """Fewest and most tokens that a prompt of `n` visual tokens in `images` images keeps.

        Equal for a single image without spread; several images are rounded one by one, and with
        spread once more.
        """
        if images > 1 and self.scope == "image":
            if self.tokens is not None:
                low, high = min(n, self.tokens), min(n, self.tokens * images)
            else:
                share = (self.ratio or 0.0) * n
                low = max(0, math.floor(share - images / 2))
                high = min(n, math.ceil(share + images * max(0.5, self.min_keep)))
        else:
            low = high = self.count(n)
        if not self.spread:
            return low, high
        fewest = math.ceil(low * (1 - self.spread) - images / 2)
        most = math.floor(high * (1 + self.spread) + images / 2)
        return max(0, fewest), min(n, most)


DENSE_BUDGET = Budget(ratio=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneSpec:
    """What a request wants pruned. Hashable, and written with every result.

    Raises SpecError for values of a wrong type or form; method and options are checked later.
    """

    method: str
    """A name from `sppruner.selectors.available()`; "none" is dense."""

    budget: Budget = DENSE_BUDGET
    """How many visual tokens are kept; all of them for "none"."""

    positions: Positions = "keep"
    """"keep" leaves every kept token at its original position (pruned equals masked); "renumber"
    closes the gaps, as the original LLaVA-based codes do, also those that a method leaves inside
    the decoder, from that layer on."""

    options: Mapping[str, OptionValue] = field(default_factory=dict)
    """Keyword arguments of the method, such as {"relevance": "none"}; the method checks them."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise SpecError(f"method {self.method!r} is not a name")
        if self.positions not in ("keep", "renumber"):
            raise SpecError(f"positions {self.positions!r}: use 'keep' or 'renumber'")
        if not isinstance(self.options, Mapping):
            raise SpecError(f"options {self.options!r} is not a mapping of names to values")
        for name, value in self.options.items():
            if not isinstance(name, str):
                raise SpecError(f"option {name!r} is not a name")
            if isinstance(value, int) and not -_INT_BOUND <= value < _INT_BOUND:
                raise SpecError(f"option {name} is far too large")
            if not isinstance(value, bool | int | float | str):
                raise SpecError(f"option {name}={value!r} is not a bool, number or string")
            if isinstance(value, float) and not math.isfinite(value):
                raise SpecError(f"option {name}={value!r} is not finite: JSON cannot hold it")
        # A private copy in key order, so that equal specs have equal JSON.
        object.__setattr__(self, "options", dict(sorted(self.options.items())))
        if self.method == "none" and self.options:
            raise SpecError(f"method 'none' has no option {next(iter(self.options))!r}")
        if self.method == "none" and self.budget != DENSE_BUDGET:
            raise SpecError(
                "method 'none' keeps every token: leave the budget out, or name a method"
            )

    # Equality compares JSON: 1, 1.0 and True are equal in a dict, but different in JSON.
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
        budget = {f.name: getattr(self.budget, f.name) for f in fields(Budget)}
        defaults = {"scope": "image", "spread": 0.0}
        return {
            "method": self.method,
            # Unused fields are left out, so that new fields do not change a spec's JSON.
            "budget": {k: v for k, v in budget.items() if v is not None and defaults.get(k) != v},
            "positions": self.positions,
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruneSpec:
        """The inverse of `to_dict`; unknown keys are errors. Raises SpecError."""
        if not isinstance(data, Mapping):
            raise SpecError(f"{data!r} is not a prune spec: a mapping with a method")
        unknown = set(data) - {"method", "budget", "positions", "options"}
        if unknown or "method" not in data:
            names = sorted(map(str, unknown))
            raise SpecError(f"not a prune spec: unknown keys {names}, or no method")
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

    @classmethod
    def parse(cls, text: str, budget: Budget) -> PruneSpec:
        """Parses a method and its options as a command line writes them: `sppruner`,
        `sppruner:relevance=none:kappa=0`. "none" is dense whatever the budget. Raises SpecError."""
        method, *pairs = text.strip().split(":")
        options: dict[str, OptionValue] = {}
        for pair in pairs:
            option, separator, value = pair.partition("=")
            if not separator or not option or not value:
                raise SpecError(f"{text!r}: write options as {method}:option=value")
            options[option] = parse_value(value)
        dense = method == "none"
        return cls(method=method, budget=DENSE_BUDGET if dense else budget, options=options)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


def parse_value(text: str) -> OptionValue:
    """`text` as a bool (true, false), an int or a float, whichever fits first; else as it is."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


DENSE = PruneSpec(method="none")
