"""Only decoders with full causal attention in every layer are pruned inside or run in slots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sppruner.decoder import first_prunable_layer, has_full_attention


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layer_types": None, "sliding_window": None},
        {"layer_types": ["full_attention"] * 3, "attention_chunk_size": 0},
    ],
)
def test_a_decoder_without_bounds_on_attention_is_prunable_from_layer_1(
    config: dict[str, Any],
) -> None:
    assert has_full_attention(SimpleNamespace(**config))
    assert first_prunable_layer(SimpleNamespace(**config)) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 40},
        {"attention_chunk_size": 8},
        {"use_bidirectional_attention": True},
    ],
)
def test_a_decoder_with_windows_chunks_or_bidirectional_attention_is_not(
    config: dict[str, Any],
) -> None:
    assert not has_full_attention(SimpleNamespace(**config))
    assert first_prunable_layer(SimpleNamespace(**config)) is None
