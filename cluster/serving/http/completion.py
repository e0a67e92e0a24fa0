"""A chat completion in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sppruner.engine.interface import Result
from sppruner.engine.token_logprobs import TokenLogprob


def completion(
    envelope: dict[str, Any],
    results: Sequence[Result],
    *,
    report: bool = False,
    logprobs: bool = False,
) -> dict[str, Any]:
    """The body of an answer, one choice for each result. envelope: id, created and model. report:
    whether to say which visual tokens were kept. logprobs: how probable the answer's tokens were.
    """
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "finish_reason": result.finish_reason,
            "logprobs": _logprobs(result.logprobs) if logprobs else None,
        }
        for index, result in enumerate(results)
    ]
    return envelope | {
        "object": "chat.completion",
        "choices": choices,
        "usage": usage(results),
        **(pruning(results[0]) if report else {}),
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    def told(one: TokenLogprob) -> dict[str, Any]:
        return {
            "token": one.token,
            "logprob": one.logprob,
            "bytes": list(one.token.encode("utf-8", errors="replace")),
        }

    content = [told(one) | {"top_logprobs": [told(other) for other in one.top]} for one in tokens]
    return {"content": content, "refusal": None}


def pruning(result: Result) -> dict[str, Any]:
    """Which visual tokens entered the decoder. `kept` has one bit for each, in the order of the
    prompt, the least significant bit of each byte first, in base64."""
    return {
        "pruning": {
            "images": [asdict(shape) for shape in result.image_shapes],
            "kept": base64.b64encode(result.kept_tokens).decode(),
            "seconds": result.seconds,
        }
    }


def usage(results: Sequence[Result]) -> dict[str, int]:
    """OpenAI's usage, with visual tokens before and after pruning. The prompt counts once, whatever
    the number of answers to it."""
    prompt, completed = results[0].prompt_tokens, sum(one.completion_tokens for one in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completed,
        "total_tokens": prompt + completed,
        "visual_tokens": results[0].visual_tokens,
        "visual_tokens_kept": results[0].visual_tokens_kept,
    }
