"""A static KV cache whose layers differ in length as the stages shorten the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from sppruner.types import PruneReport


def staged_static_cache(
    config: Any, reports: Sequence[PruneReport], *, max_new_tokens: int
) -> StaticCache:
    """A cache for `generate(past_key_values=…)` that holds, at each layer, the longest prompt's
    tokens and the new tokens.

    `cache_implementation="static"` allocates all layers at the length of the first, so that pruning
    inside the decoder saves no memory. config: the model's. The lengths hold for one `generate` of
    exactly the batch of `reports`.
    """
    # The last new token does not enter the model.
    lengths = [
        max(tokens) + max(0, max_new_tokens - 1)
        for tokens in zip(*(report.layer_tokens for report in reports), strict=True)
    ]
    cache = StaticCache(config=config, max_cache_len=max(lengths))
    cache.layers = [StaticLayer(max_cache_len=length) for length in lengths]
    return cache
