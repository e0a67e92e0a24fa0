"""Random planes for the tests of methods, and the arithmetic that their references share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sppruner.selectors import selector_for
from sppruner.signals import ATTENTION, CLS_ATTENTION, CONTENT_SEED, KEYS, RECEIVED_ATTENTION
from sppruner.spec import PruneSpec
from sppruner.types import Selection, VisualTokens

Array = NDArray[np.float64]


def make(rows: int, columns: int, *, seed: int = 0, width: int = 16) -> VisualTokens:
    """A plane of independent random tokens with every signal."""
    generator = torch.Generator().manual_seed(seed)
    n = rows * columns
    attention_N = torch.rand(n, generator=generator)
    return VisualTokens(
        features_ND=torch.randn(n, width, generator=generator),
        hidden_NV=torch.randn(n, 40, generator=generator),
        coords_N2=torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(n, 2),
        signals={
            ATTENTION: attention_N,
            CLS_ATTENTION: attention_N,
            RECEIVED_ATTENTION: torch.rand(n, generator=generator),
            KEYS: torch.randn(n, 8, generator=generator),
            CONTENT_SEED: torch.tensor(seed),
        },
        relevance_N=torch.randn(n, generator=generator),
    )


def flat(image: VisualTokens) -> VisualTokens:
    """The same plane with equal features, states and signals for all tokens."""
    assert image.hidden_NV is not None
    signals = {
        name: torch.ones_like(value) if value.dim() else value
        for name, value in image.signals.items()
    }
    return replace(
        image,
        features_ND=torch.ones_like(image.features_ND),
        hidden_NV=torch.ones_like(image.hidden_NV),
        signals=signals,
        relevance_N=torch.ones(image.count),
    )


def choose(method: str, images: list[VisualTokens], counts: list[int], **options: Any) -> Any:
    selector = selector_for(PruneSpec(method=method, options=options))
    assert selector is not None
    return selector.select(images, counts)


def same(a: Selection, b: Selection) -> bool:
    """Equal indices, and equal replacements up to rounding."""
    if not a.index_K.equal(b.index_K):
        return False
    for one, other in ((a.replace_KD, b.replace_KD), (a.replace_KV, b.replace_KV)):
        if (one is None) != (other is None):
            return False
        if one is not None and other is not None and not torch.allclose(one, other, atol=1e-6):
            return False
    return True


def unit(rows_ND: Array) -> Array:
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def scaled(values_N: Array) -> Array:
    span = values_N.max() - values_N.min()
    return (values_N - values_N.min()) / span if span > 0 else np.zeros_like(values_N)


def doubled(values: torch.Tensor | None) -> Array:
    assert values is not None
    return values.double().numpy()


def farthest_points(image: VisualTokens, start: list[int], k: int) -> list[int]:
    """Max-min selection that continues from `start`, as in DivPrune and FSR's scan."""
    v = unit(image.features_ND.double().numpy())
    chosen = list(start)
    while len(chosen) < k:
        distance = (1 - v @ v[chosen].T).min(axis=1)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return sorted(chosen)
