"""One question about one image as a processor's batch, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from sppruner.errors import InputError


def ask_about(processor: Any, prompts: Sequence[str], images: Sequence[Image.Image]) -> Any:
    """The processor's tensors for prompts with an image each, in front of the words.

    Raises InputError for words that would read as one more image.
    """
    token = processor.image_token
    for prompt in prompts:
        if token in prompt:
            raise InputError(f"the prompt {prompt!r} holds {token!r}, which stands for an image")
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        for prompt in prompts
    ]
    return processor(
        text=[processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns],
        images=[[image] for image in images],
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
