"""Log-probabilities of an answer, read while `generate` runs.

Everything goes through `generate`, whose cache, masks and positions are right for every method,
those that prune inside the decoder included. An answer that equals the dense one has by itself
been read under teacher forcing; only others need a second, forced pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class AnswerReader(LogitsProcessor):
    """Reads, at each step, the log-probability of a reference token, or of the likeliest one where
    there is no reference; with `force` also makes `generate` choose the reference.

    first_BV: log-probabilities of the first token of the answer. Passed last to `generate`, so
    that it sees scores after every rule of the model's own, such as suppressed tokens.
    """

    def __init__(self, reference: Sequence[Sequence[int]] | None = None, force: bool = False):
        self._reference = reference
        self._force = force
        self._step = 0
        self._read: list[Tensor] = []
        self.first_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_BV = scores.float().log_softmax(dim=-1)
        if self._step == 0:
            self.first_BV = log_BV
        token_B, live_B = self._due(log_BV)
        self._read.append(log_BV.gather(1, token_B[:, None])[:, 0])
        self._step += 1
        if not self._force:
            return scores
        chosen_BV = torch.full_like(scores, -torch.inf).scatter(1, token_B[:, None], 0.0)
        return torch.where(live_B[:, None], chosen_BV, scores)

    def _due(self, log_BV: Tensor) -> tuple[Tensor, Tensor]:
        """The token to read of each row at this step, and whether its answer still runs."""
        if self._reference is None:
            return log_BV.argmax(dim=1), torch.ones(len(log_BV), dtype=torch.bool)
        live = [len(tokens) > self._step for tokens in self._reference]
        due = [
            tokens[self._step] if runs else 0
            for tokens, runs in zip(self._reference, live, strict=True)
        ]
        device = log_BV.device
        return torch.tensor(due, device=device), torch.tensor(live, device=device)

    def mean_logprobs(self, lengths: Sequence[int]) -> list[float]:
        """Mean log-probability per token of each row's first `length` tokens, in nats."""
        read_BT = torch.stack(self._read, dim=1)
        return [
            float(row_T[:length].mean()) for row_T, length in zip(read_BT, lengths, strict=True)
        ]


def divergence_B(dense_BV: Tensor, pruned_BV: Tensor) -> Tensor:
    """KL(dense ‖ pruned) of log-probabilities, [B], in nats; tokens dense rules out count 0."""
    surprise_BV = torch.where(dense_BV.isneginf(), 0.0, dense_BV - pruned_BV)
    return (dense_BV.exp() * surprise_BV).sum(dim=1).clamp(min=0)


def up_to_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The tokens of an answer with its end token, without what fills the batch up."""
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return list(tokens[: end + 1])
