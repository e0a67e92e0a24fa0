"""The decoder's share: prefill, decode and the KV cache, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderCost:
    """A Llama-like decoder (SwiGLU, grouped-query attention). The prompt's length is given for
    each layer, since pruning inside the decoder shortens it on the way."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    bytes_per_value: int = 2

    @classmethod
    def from_config(cls, text: Any, *, bytes_per_value: int = 2) -> DecoderCost:
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            bytes_per_value=bytes_per_value,
        )

    def layer(self, queries: int, keys: int) -> int:
        """FLOPs of one layer for `queries` new tokens that attend to `keys` tokens."""
        d, width, kv_width = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        linear = (
            2 * queries * (d * width + 2 * d * kv_width + width * d + 3 * d * self.intermediate)
        )
        return linear + 4 * width * queries * keys

    @property
    def head(self) -> int:
        return 2 * self.hidden * self.vocabulary

    def prefill(self, layer_tokens: Sequence[int]) -> int:
        """The prompt through every layer, and the head at its last position."""
        return sum(self.layer(tokens, tokens) for tokens in layer_tokens) + self.head

    def decode(self, layer_tokens: Sequence[int], new_tokens: int) -> int:
        """The forwards after the prefill: `new_tokens` − 1 of them, one token each."""
        return sum(
            sum(self.layer(1, tokens + step) for tokens in layer_tokens) + self.head
            for step in range(1, new_tokens)
        )

    def stages(self, layer_tokens: Sequence[int]) -> int:
        """What choosing tokens inside the decoder costs: one attention row, of all heads, in each
        layer before one with fewer tokens."""
        read = (tokens for tokens, next_ in pairwise(layer_tokens) if next_ < tokens)
        return sum(2 * self.heads * self.head_dim * tokens for tokens in read)

    def scoring(self, layer_tokens: Sequence[int]) -> int:
        """What it costs on top to have these rows of the later layer, the stage's own, which has
        not run yet: its keys of all tokens in front of it and its query of the last one."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        asked = (tokens for tokens, next_ in pairwise(layer_tokens) if next_ < tokens)
        return sum(2 * self.hidden * (tokens * kv_width + width) for tokens in asked)

    def kv_bytes(self, layer_tokens: Sequence[int], new_tokens: int) -> int:
        """Keys and values held once the last token is out (it is never fed back)."""
        held = sum(layer_tokens) + len(layer_tokens) * max(0, new_tokens - 1)
        return 2 * self.kv_heads * self.head_dim * held * self.bytes_per_value
