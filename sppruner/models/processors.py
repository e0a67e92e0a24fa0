"""Processors for images only: half of the families' processors require a video processor, and
`transformers` has those for torchvision only."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from sppruner.errors import InputError

_VIDEO = "video_processor"


class _NoVideos:
    """Stands in for the video processor where a processor reads its settings."""

    num_frames = fps = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError("videos are not processed: send images only")


class _ImagesOnly(ProcessorMixin):
    """Mixin of a family's processor class: loads its tokenizer and image processor as usual, and no
    video processor."""

    video_processor = _NoVideos()

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != _VIDEO]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        # Some families' constructors require the argument; any value will do.
        return super().from_args_and_dict(args, processor_dict | {_VIDEO: None}, **kwargs)


def processor_of(config: Any, path: str) -> Any:
    """The processor in folder `path` of a model with this config: the family's own class with
    torchvision, else that class without its video processor."""
    family = PROCESSOR_MAPPING.get(type(config), None)
    if is_torchvision_available() or family is None or _VIDEO not in family.get_attributes():
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)
    images_only: Any = type(family.__name__, (_ImagesOnly, family), {})
    return images_only.from_pretrained(path, trust_remote_code=False)
