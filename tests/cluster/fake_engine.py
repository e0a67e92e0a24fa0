"""A model whose output can be checked: it answers with the image's colour hash and how many tokens
it kept. What it should do wrong is written in the prompt, so that it travels with the row.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
from pathlib import Path

import torch
from PIL import Image

from sppruner.engine.interface import Request, Result
from sppruner.engine.queued import QueuedEngine

VISUAL_TOKENS = 100


def picture(number: int) -> bytes:
    """A small PNG, different for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def image_hash(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:8]


def expected_text(data: bytes, kept: int = VISUAL_TOKENS) -> str:
    """What the engine says of this image at this number of kept tokens."""
    with Image.open(io.BytesIO(data)) as image:
        return f"{image_hash(image.convert('RGB'))} kept {kept}"


def first_kept(kept: int, total: int) -> bytes:
    """The mask of `total` tokens of which the first `kept` stay."""
    return ((1 << kept) - 1).to_bytes(-(-total // 8), "little")


class FakeEngine(QueuedEngine):
    """Prompts that do something: "raise" (the whole batch raises), "fault" (the device does),
    "die" (SIGKILL to this process), "slow" (2 s), "bad" (an error result).

    seconds: how long a batch takes. journal: a file that gets one line per batch, and a * after
    the id of each control row. reduced: the scale of every JPEG.
    """

    model_revision = "fake-1"
    image_backend = "pil"

    def __init__(
        self,
        *,
        model: str,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        slots: int = 16,
        seconds: float = 0.0,
        journal: str = "",
        reduced: int = 1,
    ) -> None:
        if model == "missing":
            raise FileNotFoundError("no weights under 'missing'")
        super().__init__(slots)
        self.model_id = model
        self.seconds = seconds
        self.journal = journal
        self.reduced = reduced

    def jpeg_scale(self, width: int, height: int) -> int:
        return self.reduced

    def warm_up(self) -> None:
        """Nothing to warm."""

    def answer_batch(self, requests: list[Request]) -> list[Result]:
        if self.journal:
            with Path(self.journal).open("a") as file:
                file.write(" ".join(f"{r.id}{'*' * r.control}" for r in requests) + "\n")
        time.sleep(2.0 if any(r.prompt == "slow" for r in requests) else self.seconds)
        if any(request.prompt == "die" for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(request.prompt == "fault" for request in requests):
            raise torch.AcceleratorError("the device is gone")
        if any(request.prompt == "raise" for request in requests):
            raise RuntimeError("the model raised")
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Result:
        if request.prompt == "bad":
            return Result(
                id=request.id,
                text=None,
                error_code="prompt_invalid",
                error_message="too long",
                error_stage="prompt",
            )
        total = VISUAL_TOKENS * len(request.images)
        kept = total if request.spec.is_dense else request.spec.budget.count(total)
        hashes = "+".join(image_hash(image) for image in request.images)
        system = f"[{request.system}] " if request.system else ""
        return Result(
            id=request.id,
            text=f"{system}{hashes} kept {kept}",
            finish_reason="stop",
            prompt_tokens=len(request.prompt) + kept,
            completion_tokens=3,
            visual_tokens=total,
            visual_tokens_kept=kept,
            kept_tokens=first_kept(kept, total),
            seconds=0.01,
            control_text=f"{system}{hashes} kept {total}" if request.control else None,
            control_seconds=0.02 if request.control else None,
        )
