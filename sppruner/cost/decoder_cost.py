"""Cost of the decoder: prefill, decode and the KV cache, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderCost:
    """A Llama-like decoder (SwiGLU, grouped-query attention).

    Methods take the prompt's length at each layer, since pruning inside the decoder shortens it
    from layer to layer.
    """

    layers: int
    """Decoder layers."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of one head."""
    intermediate: int
    """Inner width of the MLP."""
    vocabulary: int
    """Output size of the language-model head."""
    bytes_per_value: int = 2
    """Bytes of one cached key or value element."""

    @classmethod
    def from_config(cls, text: Any, *, bytes_per_value: int = 2) -> DecoderCost:
        """From a text config of transformers."""
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
        """FLOPs of the language-model head at one position."""
        return 2 * self.hidden * self.vocabulary

    def prefill(self, layer_tokens: Sequence[int]) -> int:
        """FLOPs of the prompt through all layers, and of the head at its last position."""
        return sum(self.layer(tokens, tokens) for tokens in layer_tokens) + self.head

    def decode(self, layer_tokens: Sequence[int], new_tokens: int) -> int:
        """FLOPs of the `new_tokens` − 1 decode steps after the prefill, one token each."""
        return sum(
            sum(self.layer(1, tokens + step) for tokens in layer_tokens) + self.head
            for step in range(1, new_tokens)
        )

    def stages(self, layer_tokens: Sequence[int]) -> int:
        """FLOPs of the attention rows that stages rank by: one row over all heads for each layer
        after which tokens are dropped."""
        scored = (tokens for tokens, after in pairwise(layer_tokens) if after < tokens)
        return sum(2 * self.heads * self.head_dim * tokens for tokens in scored)

    def scoring(self, layer_tokens: Sequence[int]) -> int:
        """FLOPs in addition to `stages` if the rows are those of the stage's layer, which has not
        run yet: its keys of all tokens that enter it and its query of the last token."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        scored = (tokens for tokens, after in pairwise(layer_tokens) if after < tokens)
        return sum(2 * self.hidden * (tokens * kv_width + width) for tokens in scored)

    def kv_bytes(self, layer_tokens: Sequence[int], new_tokens: int) -> int:
        """Bytes of keys and values after the last new token, which does not enter the model."""
        cached = sum(layer_tokens) + len(layer_tokens) * max(0, new_tokens - 1)
        return 2 * self.kv_heads * self.head_dim * cached * self.bytes_per_value
