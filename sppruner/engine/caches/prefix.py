"""Prefix cache: keys and values of prompts up to their last image, for later prompts that share
them.

A prompt with the same prefix, images and spec starts with the same keys and values: its images are
neither encoded nor selected from, and only its suffix, the text after them, is read. A method that
selects by the question keeps other tokens for another question, so its prefixes are shared for the
same question only.
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
    """The prefix of a prompt, as the decoder left it."""

    keys: list[Tensor]
    """Keys of each layer, [heads, length, width]."""

    values: list[Tensor]
    """Values of each layer, as `keys`."""

    ids: list[int]
    """Its token ids as the decoder read them."""

    positions: list[int]
    """Position ids of the token after it, one per row of position ids."""

    report: PruneReport
    """Of the prompt that it was read with."""

    suffix_tokens: int
    """Tokens of that prompt after the prefix."""

    def report_for(self, suffix_tokens: int) -> PruneReport:
        """The report of a prompt with this prefix and a suffix of so many tokens."""
        more = suffix_tokens - self.suffix_tokens
        return replace(
            self.report,
            prompt_tokens=self.report.prompt_tokens + more,
            prompt_tokens_dense=self.report.prompt_tokens_dense + more,
            layer_tokens=tuple(tokens + more for tokens in self.report.layer_tokens),
        )

    @property
    def size(self) -> int:
        """Bytes of its keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class PrefixCache:
    """LRU cache of prefixes. Its tensors are shared: nobody may change them.

    limit: most bytes of all entries together. hits, misses: prompts whose prefix was found, and
    prompts with a shareable prefix that was not. Raises SpecError for a negative limit.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise SpecError(f"a prefix cache of {limit} bytes: give 0 for no cache, or more")
        self.limit = limit
        self.hits = self.misses = 0
        self._entries: LRUCache[Hashable, Prefix] = LRUCache(limit, getsizeof=lambda e: e.size)

    @property
    def size(self) -> int:
        """Bytes held."""
        return int(self._entries.currsize)

    def clear(self) -> None:
        """Drops all entries."""
        self._entries.clear()

    def get(self, key: Hashable) -> Prefix | None:
        """The prefix under a key, which becomes the most recently used one; None if there is
        none."""
        return self._entries.get(key)

    def put(self, key: Hashable, prefix: Prefix) -> None:
        """Stores a copy of its tensors: the group's cache that they are views into may be large. A
        prefix above the limit is not stored."""
        if prefix.size <= self.limit:
            self._entries[key] = replace(
                prefix,
                keys=[states.clone() for states in prefix.keys],
                values=[states.clone() for states in prefix.values],
            )
