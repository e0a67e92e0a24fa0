"""Which token comes next: the processors that `generate` would build, one request at a time where
they differ. Shapes: N requests, V vocabulary."""

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

# What a model's generation config may ask of logits and is not done here, with what means nothing.
_NOT_DONE: Final[dict[str, tuple[object, ...]]] = {
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
class Choice:
    """What the next token of one request depends on besides its logits.

    ids: prompt and answer so far. generator: of a sampled request alone, so that its draws are the
    same in any company.
    """

    generation: SamplingParams
    ids: list[int]
    generator: torch.Generator | None = field(init=False, default=None)
    warpers: LogitsProcessorList = field(init=False)

    def __post_init__(self) -> None:
        self.warpers = LogitsProcessorList()
        asked = self.generation
        if asked.temperature > 0:
            self.generator = torch.Generator().manual_seed(asked.seed)
            if asked.temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(asked.temperature))
            if asked.top_p < 1:
                self.warpers.append(TopPLogitsWarper(asked.top_p))


class Sampler:
    """Chooses tokens as a model's own `generate` does with the same settings.

    never: ids that are never chosen. device: of the logits. Raises UnsupportedModel for a
    generation config that asks for something else, so that no answer silently differs.
    """

    def __init__(
        self, generation_config: Any, never: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        for name, neutral in _NOT_DONE.items():
            asked = getattr(generation_config, name, None)
            if asked not in neutral:
                raise UnsupportedModel(
                    f"the model's generation config sets {name}={asked!r}, which only `generate` "
                    "can do: remove it, or answer with a BatchEngine"
                )
        suppressed = generation_config.suppress_tokens or ()
        self._never = torch.tensor(sorted({*never, *suppressed}), dtype=torch.int64, device=device)
        penalty = generation_config.repetition_penalty
        self._penalty = (
            None if penalty in (None, 1.0) else RepetitionPenaltyLogitsProcessor(penalty)
        )

    def choose(self, logits_NV: Tensor, choices: Sequence[Choice]) -> list[int]:
        """The next token of each request; its `ids` grow by it."""
        scores_NV = logits_NV.float()
        if self._penalty is not None:
            scores_NV = torch.cat(
                [
                    self._penalty(torch.tensor([c.ids], device=row.device), row[None])
                    for c, row in zip(choices, scores_NV, strict=True)
                ]
            )
        scores_NV = scores_NV.index_fill(1, self._never, float("-inf"))
        tokens = scores_NV.argmax(dim=1).tolist()
        for i, choice in enumerate(choices):
            if choice.generator is not None:
                tokens[i] = _drawn(scores_NV[i : i + 1], choice)
            choice.ids.append(tokens[i])
        return tokens


def _drawn(scores_1V: Tensor, choice: Choice) -> int:
    ids = torch.empty(1, 0, dtype=torch.int64)  # warpers look at the scores alone
    warped = choice.warpers(ids, scores_1V)
    # On the CPU: the same seed draws the same tokens whatever the model runs on.
    shares = torch.softmax(warped, dim=-1).cpu()
    return int(torch.multinomial(shares, 1, generator=choice.generator))
