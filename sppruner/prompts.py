"""Builds a processor's batch of prompts with images, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from sppruner.errors import InputError
from sppruner.proportions import check_proportions


def placeholder_words(processor: Any) -> list[str]:
    """The strings that stand for an image or a video in a prompt."""
    names = ("image_token", "video_token")
    return [word for name in names if (word := getattr(processor, name, None)) is not None]


def chat_text(
    processor: Any, prompt: str, images: Sequence[Image.Image], system: str | None
) -> str:
    """A prompt with one placeholder for each of its images in front of its text, as the model's
    chat template has it. Raises what `build_inputs` raises."""
    check_proportions(processor.image_processor, images)
    for word in placeholder_words(processor):
        if word in prompt or word in (system or ""):
            raise InputError(
                f"the prompt holds {word!r}, which stands for an image or video: remove it"
            )
    content: list[dict[str, str]] = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": prompt})
    turn: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        turn.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    text: str = processor.apply_chat_template(turn, add_generation_prompt=True)
    return text


def build_inputs(
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Image.Image | Sequence[Image.Image]],
    systems: Sequence[str | None] | None = None,
) -> Any:
    """The processor's tensors for prompts, each with its images in front of its text.

    images: one image, several or none per prompt. systems: a system message or None per prompt.
    Raises InputError for text that the model would read as another image or a video, and
    ImageTooNarrow for an image that the processor cannot take at a bounded expense.
    """
    image_lists = [[one] if isinstance(one, Image.Image) else list(one) for one in images]
    messages = systems or [None] * len(prompts)
    return processor(
        text=[
            chat_text(processor, prompt, own_images, system)
            for prompt, own_images, system in zip(prompts, image_lists, messages, strict=True)
        ],
        images=image_lists if any(image_lists) else None,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
