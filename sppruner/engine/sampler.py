"""The sampler: the logits processors that `generate` would build, per request where they differ.

Shapes: N requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sppruner.engine.interface import SamplingParams
from sppruner.errors import UnsupportedModel

# Settings of a generation config that change logits and are not implemented here, with the values
# that have no effect.
_UNSUPPORTED: Final[dict[str, tuple[object, ...]]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "sequence_bias": (None, {}),
    "watermarking_config": (None,),
}


@dataclass(slots=True, eq=False)
class SamplingState:
    """What the next token of one request depends on besides its logits."""

    params: SamplingParams
    """The request's generation settings."""

    ids: list[int]
    """Token ids of the prompt and of the answer so far."""

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

    suppressed: ids that are never chosen. device: of the logits. Raises UnsupportedModel for a
    generation config with a setting that is not implemented, so that no answer silently differs.
    """

    def __init__(
        self,
        generation_config: Any,
        suppressed: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        for name, neutral in _UNSUPPORTED.items():
            value = getattr(generation_config, name, None)
            if value not in neutral:
                raise UnsupportedModel(
                    f"the model's generation config sets {name}={value!r}, which only `generate` "
                    "can do: remove it, or answer with a BatchEngine"
                )
        ids = sorted({*suppressed, *(generation_config.suppress_tokens or ())})
        self._suppressed = torch.tensor(ids, dtype=torch.int64, device=device)
        penalty = generation_config.repetition_penalty
        self._penalty = (
            None if penalty in (None, 1.0) else RepetitionPenaltyLogitsProcessor(penalty)
        )

    def sample(self, logits_NV: Tensor, states: Sequence[SamplingState]) -> list[int]:
        """The next token of each request, which is also appended to its state's `ids`."""
        scores_NV = logits_NV.float()
        if self._penalty is not None:
            scores_NV = torch.cat(
                [
                    self._penalty(torch.tensor([state.ids], device=scores_V.device), scores_V[None])
                    for state, scores_V in zip(states, scores_NV, strict=True)
                ]
            )
        scores_NV = scores_NV.index_fill(1, self._suppressed, float("-inf"))
        tokens = scores_NV.argmax(dim=1).tolist()
        for i, state in enumerate(states):
            if state.generator is not None:
                tokens[i] = _draw(scores_NV[i : i + 1], state)
            state.ids.append(tokens[i])
        return tokens


def _draw(scores_1V: Tensor, state: SamplingState) -> int:
    no_ids = torch.empty(1, 0, dtype=torch.int64)  # warpers read the scores only
    warped_1V = state.warpers(no_ids, scores_1V)
    # On the CPU, the same seed draws the same tokens whatever device the model runs on.
    probabilities_1V = torch.softmax(warped_1V, dim=-1).cpu()
    return int(torch.multinomial(probabilities_1V, 1, generator=state.generator))
