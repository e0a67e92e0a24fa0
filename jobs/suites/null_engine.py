"""An engine that costs nothing: what is left of a job's time is the machinery around it."""

from __future__ import annotations

from sppruner.engine.interface import Request, Result
from sppruner.engine.queued import QueuedEngine

_VISUAL_TOKENS = 100


class NullEngine(QueuedEngine):
    """Answers each request at once, as if the tokens that its budget allows had been kept."""

    image_backend = "pil"
    dtype = "float32"

    def __init__(
        self, *, model: str, device: str, dtype: str, slots: int, revision: str | None = None
    ) -> None:
        super().__init__(slots)
        self.model_id = model
        self.model_revision = revision or "none"

    def jpeg_scale(self, width: int, height: int) -> int:
        """Images are decoded in full."""
        return 1

    def warm_up(self) -> None:
        """Nothing to warm."""

    def answer_batch(self, requests: list[Request]) -> list[Result]:
        """A text and the mask of the first tokens."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Result:
        total = _VISUAL_TOKENS * len(request.images)
        kept = total if request.spec.is_dense else request.spec.budget.count(total)
        return Result(
            id=request.id,
            text="a text of a few words for this image",
            finish_reason="stop",
            prompt_tokens=8 + kept,
            completion_tokens=8,
            visual_tokens=total,
            visual_tokens_kept=kept,
            kept_tokens=((1 << kept) - 1).to_bytes(-(-total // 8), "little"),
            seconds=1e-6,
        )
