"""The architectures of the recipe: model, vision encoder, saliency and position ids of each.

Both families share the vocabulary, the token space, the scenes and every stage. To train the second
model: `python jobs/train_tiny.py --family qwen --output DIR --work WORK`; link the scenes of the
first run's work folder into WORK to avoid rendering them again. After an interruption the same
command resumes from WORK.
Shapes: B images, C channels, H height, W width, N = 144 visual tokens, K kept ones, T text tokens,
D width of a token, V width of the pooled vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from jobs.training.scene_cache import SceneCache
from jobs.training.vision import VisionEncoder, init_vision
from jobs.training.windows import WindowVisionEncoder, init_windows
from sppruner.tiny.layout import GRID
from sppruner.tiny.model import (
    SPECIAL_TOKENS,
    VISUAL_TOKENS,
    build_model,
    build_processor,
    build_tokenizer,
    save,
)
from sppruner.tiny.qwen import (
    VISION_END,
    VISION_START,
    build_qwen_model,
    build_qwen_tokenizer,
    save_qwen,
)

__all__ = ["FAMILIES", "LLAVA", "QWEN", "Family"]

_PROMPT_START: Final = (SPECIAL_TOKENS.index("<s>"), SPECIAL_TOKENS.index("<user>"))


class Family(ABC):
    """One architecture."""

    name: ClassVar[str]
    """Value of --family."""
    before: tuple[int, ...]
    """Token ids before an image's visual tokens; the prompt starts with them."""
    after: tuple[int, ...]
    """Token ids after an image's visual tokens."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; ids of the shared vocabulary are equal in all families."""

    @abstractmethod
    def build(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        """The model with the library's random weights."""

    @abstractmethod
    def init_vision(self, model: Any, cache: SceneCache) -> None:
        """Applies the recipe's initialisation of the vision tower."""

    @abstractmethod
    def build_vision_encoder(self, model: Any) -> nn.Module:
        """A module: images (B, 3, H, W) to visual tokens (B, N, D) and a pooled vector (B, V)."""

    @abstractmethod
    def saliency(self, model: Any, images_BCHW: Tensor) -> list[Tensor]:
        """(B, N) attention saliency of every layer that has one; pruners read the last."""

    @abstractmethod
    def positions(self, keep_BK: Tensor, text_BT: Tensor) -> Tensor:
        """Position ids of `before`, kept visual tokens, `after` and text, in the model's format.

        `text_BT` counts from 0 after the image; visual tokens keep their positions.
        """

    @abstractmethod
    def save(self, model: Any, folder: Path) -> None:
        """Writes a folder for `from_pretrained`."""


class LlavaFamily(Family):
    """CLIP tower with a class token, one-dimensional positions."""

    name = "llava"
    before = _PROMPT_START
    after = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer()

    def build(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        return build_model(tokenizer)

    def init_vision(self, model: Any, cache: SceneCache) -> None:
        init_vision(model, cache)

    def build_vision_encoder(self, model: Any) -> nn.Module:
        return VisionEncoder(model)

    @torch.inference_mode()
    def saliency(self, model: Any, images_BCHW: Tensor) -> list[Tensor]:
        """Attention from the class token, mean over heads."""
        tower = model.model.vision_tower
        before = tower.config._attn_implementation
        tower.set_attn_implementation("eager")
        try:
            output = tower(images_BCHW.to(model.dtype), output_attentions=True, return_dict=True)
        finally:
            tower.set_attn_implementation(before)
        return [attention[:, :, 0, 1:].float().mean(1) for attention in output.attentions]

    def positions(self, keep_BK: Tensor, text_BT: Tensor) -> Tensor:
        first = len(self.before)
        head = torch.arange(first, device=keep_BK.device).expand(len(keep_BK), -1)
        return torch.cat([head, first + keep_BK, first + VISUAL_TOKENS + text_BT], 1)

    def save(self, model: Any, folder: Path) -> None:
        save(model, build_processor(), folder)


class QwenFamily(Family):
    """Tower without a class token, time-height-width positions (M-RoPE)."""

    name = "qwen"

    def __init__(self) -> None:
        start, end = build_qwen_tokenizer().convert_tokens_to_ids([VISION_START, VISION_END])
        self.before = (*_PROMPT_START, start)
        self.after = (end,)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_qwen_tokenizer()

    def build(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        return build_qwen_model(tokenizer)

    def init_vision(self, model: Any, cache: SceneCache) -> None:
        init_windows(model, cache)

    def build_vision_encoder(self, model: Any) -> nn.Module:
        return WindowVisionEncoder(model)

    def saliency(self, model: Any, images_BCHW: Tensor) -> list[Tensor]:
        """Attention received in the last block."""
        return [WindowVisionEncoder(model).received_attention(images_BCHW.to(model.dtype))]

    def positions(self, keep_BK: Tensor, text_BT: Tensor) -> Tensor:
        first = len(self.before)
        head = torch.arange(first, device=keep_BK.device).expand(3, len(keep_BK), -1)
        row, column = keep_BK // GRID, keep_BK % GRID
        image = first + torch.stack([torch.zeros_like(row), row, column])
        # M-RoPE: text continues after the longer side of the grid.
        tail = first + GRID + torch.arange(len(self.after), device=keep_BK.device)
        text = (first + GRID + len(self.after) + text_BT).expand(3, -1, -1)
        return torch.cat([head, image, tail.expand(3, len(keep_BK), -1), text], 2)

    def save(self, model: Any, folder: Path) -> None:
        save_qwen(model, build_qwen_tokenizer(), folder)


LLAVA: Final = LlavaFamily()
QWEN: Final = QwenFamily()
FAMILIES: Final[dict[str, Family]] = {family.name: family for family in (LLAVA, QWEN)}
