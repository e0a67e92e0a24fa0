"""What the decoder read of prompts up to their last image, kept for the next question about it.

A prompt with the same beginning, images and spec begins with the same keys and values: its images
are neither encoded nor selected from, and only the text behind them is read. Methods that go by
the question keep other tokens for another one; they share a beginning for the same question alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from cachetools import LRUCache
from torch import Tensor

from sppruner.errors import SpecError
from sppruner.types import PruneReport


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefix:
    """The beginning of a prompt.

    keys, values: of each layer, [heads, length, width]. ids: its tokens as the decoder read them.
    positions: of the token behind it, R of them. report: of the prompt it was read with, which went
    on for `behind` tokens.
    """

    keys: list[Tensor]
    values: list[Tensor]
    ids: list[int]
    positions: list[int]
    report: PruneReport
    behind: int

    def reported(self, behind: int) -> PruneReport:
        """The report of a prompt that goes on for so many tokens."""
        more = behind - self.behind
        return replace(
            self.report,
            prompt_tokens=self.report.prompt_tokens + more,
            prompt_tokens_dense=self.report.prompt_tokens_dense + more,
            layer_tokens=tuple(tokens + more for tokens in self.report.layer_tokens),
        )

    @property
    def size(self) -> int:
        """Bytes of memory that it holds."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class PrefixCache:
    """The beginnings seen last. Its tensors are shared: nobody may change them.

    limit: bytes that they may hold together; those that were not asked for longest go first. hits,
    misses: prompts that found their beginning, and that did not though one can be shared. Raises
    SpecError for a negative limit.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise SpecError(f"prefixes of {limit} bytes: give 0 to keep none, or more")
        self.limit = limit
        self.hits = self.misses = 0
        self._held: LRUCache[Hashable, Prefix] = LRUCache(limit, getsizeof=lambda held: held.size)

    @property
    def size(self) -> int:
        """Bytes held."""
        return int(self._held.currsize)

    def find(self, key: Hashable) -> Prefix | None:
        return self._held.get(key)

    def keep(self, key: Hashable, prefix: Prefix) -> None:
        """In memory of its own: what it was read with may be large."""
        if prefix.size <= self.limit:
            self._held[key] = replace(
                prefix,
                keys=[states.clone() for states in prefix.keys],
                values=[states.clone() for states in prefix.values],
            )
