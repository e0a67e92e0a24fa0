"""How probable the tokens of an answer were to the model. Imports no torch until they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

MOST_ALTERNATIVES: Final = 20
"""Beside each token, at most."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of an answer, or an alternative to it."""

    token: str
    """Its text; a replacement character for part of one."""

    logprob: float
    """The natural logarithm of its probability by the model's own logits: before temperature,
    nucleus, penalties and formats."""

    top: tuple[TokenLogprob, ...] = ()
    """The most probable tokens in its place, itself among them if it is one."""


def read_logprobs(tokenizer: Any, logits_V: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """Of the token that was chosen by these logits."""
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    best = logprobs_V.topk(min(alternatives, len(logprobs_V)))

    def text(number: int) -> str:
        found: str = tokenizer.decode([number])
        return found

    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(
        text(token),
        float(logprobs_V[token]),
        tuple(TokenLogprob(text(number), value) for number, value in top),
    )
