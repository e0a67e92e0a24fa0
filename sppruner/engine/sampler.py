"""The sampler: the logits processors that `generate` would build, per request where they differ.

Shapes: N requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sppruner.engine.answer_rules import AnswerRules
from sppruner.engine.format_guide import FormatGuide
from sppruner.engine.interface import SamplingParams
from sppruner.errors import EngineError


@dataclass(slots=True, eq=False)
class SamplingState:
    """What the next token of one request depends on besides its logits."""

    params: SamplingParams
    """The request's generation settings."""

    ids: list[int]
    """Token ids of the prompt and of the answer so far."""

    guide: FormatGuide | None = None
    """Follows a structured answer; None for any text."""

    failure: Exception | None = field(init=False, default=None)
    """Why its answer cannot go on."""

    generator: torch.Generator | None = field(init=False, default=None)
    """The request's own, so that its draws are the same in any company; None if greedy."""

    warpers: LogitsProcessorList = field(init=False)
    """Temperature and top-p of a sampled request."""

    def __post_init__(self) -> None:
        self.warpers = LogitsProcessorList()
        params = self.params
        if params.temperature > 0:
            self.generator = torch.Generator().manual_seed(params.seed)
            if params.temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(params.temperature))
            if params.top_p < 1:
                self.warpers.append(TopPLogitsWarper(params.top_p))


class Sampler:
    """Chooses tokens as a model's own `generate` does with the same settings.

    suppressed: ids that are never chosen. device: of the logits. Raises UnsupportedModel as
    `AnswerRules.of` does.
    """

    def __init__(
        self,
        generation_config: Any,
        suppressed: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        rules = AnswerRules.of(generation_config)
        ids = sorted({*suppressed, *rules.suppressed_ids})
        self._suppressed = torch.tensor(ids, dtype=torch.int64, device=device)
        penalty = rules.repetition_penalty
        self._penalty = None if penalty == 1 else RepetitionPenaltyLogitsProcessor(penalty)

    def sample(self, logits_NV: Tensor, states: Sequence[SamplingState]) -> list[int]:
        """The next token of each request, which is also appended to its state's `ids`; one whose
        token cannot be chosen gets a `failure`."""
        scores_NV = logits_NV.float()
        if self._penalty is not None:
            scores_NV = torch.cat(
                [
                    self._penalty(torch.tensor([state.ids], device=scores_V.device), scores_V[None])
                    for state, scores_V in zip(states, scores_NV, strict=True)
                ]
            )
        scores_NV = scores_NV.index_fill(1, self._suppressed, float("-inf"))
        for i, state in enumerate(states):
            if state.guide is not None:
                allowed_V = state.guide.allowed_V(scores_NV.shape[1]).to(scores_NV.device)
                scores_NV[i].masked_fill_(~allowed_V, float("-inf"))
        best_N1 = scores_NV.argmax(dim=1, keepdim=True)
        tokens: list[int] = best_N1[:, 0].tolist()
        numbers: list[bool] = scores_NV.gather(1, best_N1)[:, 0].isfinite().tolist()  # NaN wins
        for i, state in enumerate(states):
            if not numbers[i]:
                state.failure = EngineError("the model's logits are no numbers, or allow no token")
                continue
            try:
                if state.generator is not None:
                    tokens[i] = _draw(scores_NV[i : i + 1], state)
            except torch.AcceleratorError:
                raise
            except RuntimeError as error:  # the others of the step go on
                state.failure = error
                continue
            state.ids.append(tokens[i])
            if state.guide is not None:
                state.guide.add(tokens[i])
                state.failure = state.guide.failure
        return tokens


def _draw(scores_1V: Tensor, state: SamplingState) -> int:
    no_ids = torch.empty(1, 0, dtype=torch.int64)  # warpers read the scores only
    warped_1V = state.warpers(no_ids, scores_1V)
    # On the CPU, the same seed draws the same tokens whatever device the model runs on.
    probabilities_1V = torch.softmax(warped_1V, dim=-1).cpu()
    return int(torch.multinomial(probabilities_1V, 1, generator=state.generator))
