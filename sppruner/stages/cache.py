"""A static cache whose layers are as long as the stages leave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from sppruner.types import PruneReport


def staged_static_cache(
    config: Any, reports: Sequence[PruneReport], *, max_new_tokens: int
) -> StaticCache:
    """A cache for `generate(past_key_values=…)` with a place for each token of the longest prompt
    at each layer, and for those to come.

    `cache_implementation="static"` allocates every layer at the length of the first, which hides
    what pruning inside the decoder saves. config: the model's. Lengths hold for one `generate`
    of exactly the batch that was reported on.
    """
    # The last new token is never fed back.
    lengths = [
        max(tokens) + max(0, max_new_tokens - 1)
        for tokens in zip(*(report.layer_tokens for report in reports), strict=True)
    ]
    cache = StaticCache(config=config, max_cache_len=max(lengths))
    cache.layers = [StaticLayer(max_cache_len=length) for length in lengths]
    return cache
