"""Log-probabilities of an answer, recorded while `generate` runs.

Everything goes through `generate`, whose cache, masks and positions are right for every method,
including those that prune inside the decoder. An answer that equals the dense one is teacher-forced
already; only the others need a second, forced pass.

Shapes: B batch rows, V vocabulary, T steps of `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class LogprobRecorder(LogitsProcessor):
    """Records, at each step, the log-probability of the reference token, or of the most likely
    token without a reference; with `force` it also makes `generate` choose the reference.

    first_BV: log-probabilities of the first token of the answer. The recorder must be the last of
    `generate`'s processors, so that its scores include the model's own rules, such as suppressed
    tokens.
    """

    def __init__(self, reference: Sequence[Sequence[int]] | None = None, force: bool = False):
        self._reference = reference
        self._force = force
        self._step = 0
        self._recorded: list[Tensor] = []
        self.first_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_BV = scores.float().log_softmax(dim=-1)
        if self._step == 0:
            self.first_BV = log_BV
        token_B, running_B = self._reference_tokens(log_BV)
        self._recorded.append(log_BV.gather(1, token_B[:, None])[:, 0])
        self._step += 1
        if not self._force:
            return scores
        forced_BV = torch.full_like(scores, -torch.inf).scatter(1, token_B[:, None], 0.0)
        return torch.where(running_B[:, None], forced_BV, scores)

    def _reference_tokens(self, log_BV: Tensor) -> tuple[Tensor, Tensor]:
        """The token to record of each row at this step, and whether its answer still runs."""
        if self._reference is None:
            return log_BV.argmax(dim=1), torch.ones(len(log_BV), dtype=torch.bool)
        running = [len(tokens) > self._step for tokens in self._reference]
        token_ids = [
            tokens[self._step] if runs else 0
            for tokens, runs in zip(self._reference, running, strict=True)
        ]
        device = log_BV.device
        return torch.tensor(token_ids, device=device), torch.tensor(running, device=device)

    def mean_logprobs(self, lengths: Sequence[int]) -> list[float]:
        """Mean log-probability per token of each row's first `length` tokens, in nats."""
        recorded_BT = torch.stack(self._recorded, dim=1)
        return [
            float(row_T[:length].mean()) for row_T, length in zip(recorded_BT, lengths, strict=True)
        ]


def kl_divergence_B(dense_BV: Tensor, pruned_BV: Tensor) -> Tensor:
    """KL(dense ‖ pruned) of log-probabilities, [B], in nats. Tokens with dense probability 0 add
    0."""
    log_ratio_BV = torch.where(dense_BV.isneginf(), 0.0, dense_BV - pruned_BV)
    return (dense_BV.exp() * log_ratio_BV).sum(dim=1).clamp(min=0)


def trim_after_eos(tokens: Sequence[int], eos_ids: frozenset[int]) -> list[int]:
    """The tokens of an answer up to and including its end token, without the batch's padding."""
    end = next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens) - 1)
    return list(tokens[: end + 1])
