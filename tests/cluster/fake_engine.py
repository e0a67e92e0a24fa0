"""A fake engine with checkable output: a hash of the image's pixels and the number of kept tokens.

The fault it simulates is the row's prompt, so a fault reaches any process together with its row.
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
    """A 4 x 4 PNG, different for each number up to 65,535."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def image_hash(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:8]


def expected_text(data: bytes, kept: int = VISUAL_TOKENS) -> str:
    """The engine's text for this image with `kept` tokens kept."""
    with Image.open(io.BytesIO(data)) as image:
        return f"{image_hash(image.convert('RGB'))} kept {kept}"


def first_kept(kept: int, total: int) -> bytes:
    """A mask of `total` tokens with the first `kept` set."""
    return ((1 << kept) - 1).to_bytes(-(-total // 8), "little")


class FakeEngine(QueuedEngine):
    """Runs a batch in `seconds`, unless a prompt asks for a fault.

    Prompts: "raise" makes the whole batch raise, "fault" raises an accelerator error, "die" sends
    SIGKILL to this process, "slow" takes 2 s, "hang" ten minutes, "bad" gives an error result,
    "stageless" one that does not say where the row failed. From "break" on, every batch raises.

    seconds: duration of a batch. journal: path of a file that receives one line per batch, the ids
    of its rows with a * after those of dense ones, and a line "cleared" where caches were cleared.
    reduced: the scale of every JPEG.
    """

    model_revision = "fake-1"
    image_backend = "pil"
    dtype = "float32"

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
        self.broken = False

    def jpeg_scale(self, width: int, height: int) -> int:
        return self.reduced

    def warm_up(self) -> None:
        """Nothing to warm."""

    def clear_caches(self) -> None:
        if self.journal:
            with Path(self.journal).open("a") as file:
                file.write("cleared\n")

    def answer_batch(self, requests: list[Request]) -> list[Result]:
        if self.journal:
            with Path(self.journal).open("a") as file:
                file.write(" ".join(f"{r.id}{'*' * r.spec.is_dense}" for r in requests) + "\n")
        time.sleep(2.0 if any(r.prompt == "slow" for r in requests) else self.seconds)
        if any(request.prompt == "hang" for request in requests):
            time.sleep(600)
        if any(request.prompt == "die" for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(request.prompt == "fault" for request in requests):
            raise torch.AcceleratorError("the device is gone")
        self.broken |= any(request.prompt == "break" for request in requests)
        if self.broken or any(request.prompt == "raise" for request in requests):
            raise RuntimeError("the model raised")
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Result:
        if request.prompt == "stageless":
            return Result(id=request.id, text=None, error_code="odd", error_message="odd")
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
        )
