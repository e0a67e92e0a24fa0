"""What a checkpoint's generation config says about every answer; sampling is the request's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sppruner.errors import UnsupportedModel

# Settings that change logits and that no engine but `generate` implements, with the values that
# have no effect.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRules:
    """Rules that hold for every answer of a checkpoint."""

    end_ids: frozenset[int]
    """Token ids that end an answer; none for a model that never ends one."""
    repetition_penalty: float
    """Divides the positive logits of tokens that prompt or answer already have; 1: none."""
    suppressed_ids: tuple[int, ...]
    """Token ids that are never chosen."""

    @classmethod
    def of(cls, generation_config: Any) -> AnswerRules:
        """Raises UnsupportedModel for a setting that is not implemented, so that no answer silently
        differs."""
        for name, neutral in _UNSUPPORTED.items():
            value = getattr(generation_config, name, None)
            if value not in neutral:
                raise UnsupportedModel(
                    f"the model's generation config sets {name}={value!r}, which only `generate` "
                    "can do: remove it, or answer with a BatchEngine"
                )
        penalty = generation_config.repetition_penalty
        return cls(
            end_ids=end_ids(generation_config),
            repetition_penalty=1.0 if penalty is None else float(penalty),
            suppressed_ids=tuple(sorted(generation_config.suppress_tokens or ())),
        )


def end_ids(generation_config: Any) -> frozenset[int]:
    """Token ids that end an answer."""
    found = generation_config.eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
