"""What a decoder's config says about its attention: questions that pruning and slots depend on."""

from __future__ import annotations

from typing import Any


def has_full_attention(text_config: Any) -> bool:
    """Whether every layer of a decoder attends causally to all earlier tokens.

    Windows and chunks of attention count the tokens in the KV cache, so dropped ones would widen
    them, and a slot of its own length would shift them. Bidirectional attention has no last row
    that sees everything.
    """
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    limits = ("sliding_window", "attention_chunk_size", "use_bidirectional_attention")
    bounded = any(getattr(text_config, limit, None) for limit in limits)
    return kinds == {"full_attention"} and not bounded


def first_prunable_layer(text_config: Any) -> int | None:
    """The first decoder layer in front of which tokens may be pruned; None where none may.

    In front of layer 0 there is no attention row to rank tokens by.
    """
    return 1 if has_full_attention(text_config) else None
