"""Reads the signals that methods need from vLLM's vision towers as they run, without computing
anything twice: queries and keys on their way into one attention module, and encoder states.

The library's probes do the reading. Blocks that vLLM may compile call `forward` directly, so only
modules inside them hear a hook.

Shapes: I images or tiles, H heads of this rank, N patches, P patches of a packed sequence, D width
of a head, V width of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sppruner.signals import ClsRowProbe, ReceivedProbe


@dataclass(frozen=True, slots=True, kw_only=True)
class Ears:
    """Where a family's tower is listened to."""

    attention: nn.Module
    """The `MMEncoderAttention` whose saliency is read."""

    probe: type[ClsRowProbe] | type[ReceivedProbe]
    """How it is read."""

    states: nn.Module
    """The module whose input or output are the states that enter the projector."""

    side: Literal["input", "output"]
    """Which of the two."""


@dataclass(slots=True, kw_only=True)
class Heard:
    """What one call of a tower gave."""

    probe: ClsRowProbe | ReceivedProbe
    states: list[Tensor] = field(default_factory=list)

    def signals(self, items: int) -> list[dict[str, Tensor]]:
        """The signals of each image or tile, as all ranks of tensor parallelism see them: a rank's
        attention has its own heads only."""
        return [_over_ranks(self.probe.signals(item)) for item in range(items)]


@contextmanager
def listening(ears: Ears, patches: Sequence[int] | None, *, probe: bool) -> Iterator[Heard]:
    """Listens inside the block.

    patches: of each image of a tower that packs them into one sequence; None for one that stacks
    them. probe: whether any signal of the attention is wanted.
    """
    heard = Heard(probe=ears.probe(ears.attention))

    def hear_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
        query_IHND, key_IHND = (_by_head(x, module) for x in (query, key))
        spans = [query_IHND.shape[2]] if patches is None else list(patches)
        for query_1, key_1 in zip(
            torch.split(query_IHND, spans, dim=2), torch.split(key_IHND, spans, dim=2), strict=True
        ):
            heard.probe.read(query_1, key_1, None, module.scale)

    def hear_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.states.append(args[0] if args else next(iter(kwargs.values())))

    def hear_output(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        heard.states.append(output)

    hooks = []
    if probe:
        hooks.append(ears.attention.register_forward_pre_hook(hear_attention, with_kwargs=True))
    if ears.side == "input":
        hooks.append(ears.states.register_forward_pre_hook(hear_input, with_kwargs=True))
    else:
        hooks.append(ears.states.register_forward_hook(hear_output))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _by_head(values: Tensor, attention: Any) -> Tensor:
    """[I, H, N, D] from [I, N, H · D] or [I, N, H, D]."""
    if values.dim() == 3:
        values = values.view(*values.shape[:2], attention.num_heads, attention.head_size)
    return values.transpose(1, 2)


def _over_ranks(signals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over ranks of what is a mean over heads."""
    from vllm.distributed import (
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_reduce,
    )

    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return signals
    names, lengths = list(signals), [signals[name].numel() for name in signals]
    # One call for all: signals of one item are small.
    flat = torch.cat([signals[name].float().flatten() for name in names])
    means = (tensor_model_parallel_all_reduce(flat) / ranks).split(lengths)
    return {name: mean.view_as(signals[name]) for name, mean in zip(names, means, strict=True)}
