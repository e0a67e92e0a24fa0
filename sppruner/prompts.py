"""Builds a processor's batch of conversations with images, by the model's own chat template.

What a user writes stays text: a string such as `</s>` or `<|im_end|>`, which the tokenizer would
read as the end of a turn, is broken by a word joiner, which nobody sees.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from PIL import Image

from sppruner.conversation import Turn, ask, check_images
from sppruner.errors import InputError
from sppruner.proportions import check_proportions

_WORD_JOINER: Final = "\N{WORD JOINER}"
# By tokenizer, since reading its vocabulary takes milliseconds.
_SPECIAL: Final[WeakKeyDictionary[Any, re.Pattern[str]]] = WeakKeyDictionary()


def placeholder_words(processor: Any) -> list[str]:
    """The strings that stand for an image or a video in a prompt."""
    names = ("image_token", "video_token")
    return [word for name in names if (word := getattr(processor, name, None)) is not None]


def chat_text(processor: Any, turns: Sequence[Turn], images: Sequence[Image.Image]) -> str:
    """A conversation with one placeholder for each of its images, as the model's chat template
    has it, up to the answer. Where images stand among the texts of a turn is the template's
    decision too. Raises what `build_inputs` raises."""
    check_images(turns, len(images))
    check_proportions(processor.image_processor, images)
    for word in placeholder_words(processor):
        if any(word in text for turn in turns for text in turn.texts):
            raise InputError(
                f"the prompt holds {word!r}, which stands for an image or video: remove it"
            )
    special = _special_strings(processor.tokenizer)
    text = _render(processor, turns, special)
    if any(len(turn.texts) > 1 for turn in turns):
        # Two harmless texts of a turn may together be a special string.
        hollow = [Turn(turn.role, tuple(part and "x" for part in turn.parts)) for turn in turns]
        if special.findall(text) != special.findall(_render(processor, hollow, special)):
            raise InputError(
                "the texts of a message form a special string of the model together: send them as "
                "one text"
            )
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
    asked = zip(prompts, image_lists, messages, strict=True)
    turns = [ask(prompt, len(own), system) for prompt, own, system in asked]
    return build_chat_inputs(processor, turns, image_lists)


def build_chat_inputs(
    processor: Any,
    conversations: Sequence[Sequence[Turn]],
    images: Sequence[Sequence[Image.Image]],
) -> Any:
    """The processor's tensors for conversations, each with its images in order. Raises as
    `build_inputs`, and InputError for turns that the model's chat template refuses."""
    return processor(
        text=[
            chat_text(processor, turns, own)
            for turns, own in zip(conversations, images, strict=True)
        ],
        images=[list(own) for own in images] if any(images) else None,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )


def _render(processor: Any, turns: Sequence[Turn], special: re.Pattern[str]) -> str:
    messages = [
        {"role": turn.role, "content": [_content(part, special) for part in turn.parts]}
        for turn in turns
    ]
    try:
        text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"the model's chat template refuses this conversation: {error}") from error
    return text


def _content(part: str | None, special: re.Pattern[str]) -> dict[str, str]:
    if part is None:
        return {"type": "image"}
    return {"type": "text", "text": special.sub(_broken, part)}


def _broken(found: re.Match[str]) -> str:
    return found[0][0] + _WORD_JOINER + found[0][1:]


def _special_strings(tokenizer: Any) -> re.Pattern[str]:
    """Matches what a tokenizer reads as one of its special tokens, longest first."""
    if (known := _SPECIAL.get(tokenizer)) is not None:
        return known
    strings = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    strings |= set(tokenizer.all_special_tokens)
    # One character cannot be broken; such a token is an ordinary sign, as padding sometimes is.
    longest_first = sorted((s for s in strings if len(s) > 1), key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    _SPECIAL[tokenizer] = found
    return found
