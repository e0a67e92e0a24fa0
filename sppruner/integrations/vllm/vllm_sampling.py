"""A request's sampling, and what its checkpoint says of every answer, in vLLM's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sppruner.engine.answer_rules import AnswerRules
from sppruner.engine.interface import SamplingParams
from sppruner.errors import InputError

_COLDEST: Final = 0.01
_NEVER: Final = -100.0  # vLLM's lowest bias: no logit is so far above the others


def vllm_sampling(
    params: SamplingParams,
    rules: AnswerRules,
    *,
    banned: Sequence[int],
    stream: bool,
    logprobs: int | None = None,
) -> Any:
    """vLLM's `SamplingParams`. banned: token ids that must not be generated: they would be read as
    an image. logprobs: see `Request`. Raises InputError for a temperature that vLLM would change.

    vLLM is opened without the checkpoint's generation config, of which it would also take the
    sampling: what holds for every answer is said here. The tokenizer's end token, which vLLM looks
    for by itself, may be none of the checkpoint's.
    """
    from vllm import SamplingParams as VllmSampling
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if 0 < params.temperature < _COLDEST:
        raise InputError(f"temperature {params.temperature}: vLLM has 0, or at least {_COLDEST}")
    structured = None
    if params.format is not None:
        form = params.format
        structured = StructuredOutputsParams(
            json=form.json_schema, regex=form.regex, choice=list(form.choice) or None
        )
    return VllmSampling(
        temperature=params.temperature,
        top_p=params.top_p if params.temperature else 1.0,
        seed=_seed(params.seed) if params.temperature else None,
        max_tokens=params.max_new_tokens,
        stop=list(params.stop),
        stop_token_ids=sorted(rules.end_ids),
        # A structured answer ends with the tokenizer's.
        ignore_eos=structured is None,
        structured_outputs=structured,
        repetition_penalty=rules.repetition_penalty,
        logprobs=logprobs,
        logit_bias=dict.fromkeys([*banned, *rules.suppressed_ids], _NEVER),
        output_kind=RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY,
    )


def _seed(seed: int) -> int:
    """Within 64 bits, signed; to vLLM -1 is no seed."""
    wrapped = (seed + 2**63) % 2**64 - 2**63
    return 2**63 - 1 if wrapped == -1 else wrapped
