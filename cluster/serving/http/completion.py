"""A chat completion in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sppruner.engine.interface import Result


def completion(envelope: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """The body of an answer, one choice for each result. envelope: id, created and model."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": result.text, "refusal": None},
            "finish_reason": result.finish_reason,
            "logprobs": None,
        }
        for index, result in enumerate(results)
    ]
    return envelope | {
        "object": "chat.completion",
        "choices": choices,
        "usage": usage(results),
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
