"""The fake engine of these runs: its text proves image and prompt, and its pixels make it fail.

The blue channel of an image is the row's behaviour, so a fault travels with its row. Files in
`signals` are faults of the moment: the first engine that takes one acts on it, once.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from PIL import Image

from sppruner.cost import RowCost
from sppruner.engine.interface import Request, Result
from tests.cluster.fake_engine import VISUAL_TOKENS, FakeEngine, image_hash

CALM: Final = 7
"""Behaviour of a row that is answered."""
KILLS: Final = 1
"""Behaviour of a row that kills the process that runs it."""
RAISES: Final = 2
"""Behaviour of a row that makes its batch raise, every time."""
RETAIN: Final = 0.25
"""Share of tokens that these runs keep."""
SLOTS: Final = 4
"""Requests that one of these engines answers at once."""
COST: Final = RowCost(
    flops={"vision": 3, "prefill": 5}, flops_dense={"vision": 3, "prefill": 11},
    kv_bytes=7, kv_bytes_dense=17,
)  # fmt: skip
"""Modelled cost of every answer."""
_HUNG_SECONDS: Final = 900.0


def expected_text(image: Image.Image, prompt: str) -> str:
    """What a good row of these runs must say."""
    return _text(image_hash(image), prompt, int(VISUAL_TOKENS * RETAIN))


def expected_control(image: Image.Image, prompt: str) -> str:
    """What its dense twin must say, where it is a control row: of every other image the same."""
    return _control_text(image_hash(image), prompt)


class ChaosEngine(FakeEngine):
    """signals: a folder. A file `raise-…` in it makes a batch raise, and all parts of it down to a
    single row, as a device out of memory does; `hang-…` makes one step hang. tag: nothing but
    another fingerprint."""

    def __init__(self, *, signals: str, tag: str = "", **settings: Any) -> None:
        super().__init__(**settings)
        self._signals = Path(signals)
        self._raising = False

    def answer_batch(self, requests: list[Request]) -> list[Result]:
        if self._take("hang"):
            time.sleep(_HUNG_SECONDS)
        if self._raising or self._take("raise"):
            self._raising = len(requests) > 1
            raise RuntimeError("out of memory, this once")
        behaviours = {_behaviour(request) for request in requests}
        if KILLS in behaviours:
            os.kill(os.getpid(), signal.SIGKILL)
        if RAISES in behaviours:
            raise RuntimeError("this row makes the model raise")
        return super().answer_batch(requests)

    def _answer(self, request: Request) -> Result:
        result = super()._answer(request)
        (image,) = request.images
        hashed = image_hash(image)
        if request.spec.is_dense:
            text = _control_text(hashed, request.prompt)
        else:
            text = _text(hashed, request.prompt, result.visual_tokens_kept)
        return replace(result, text=text, cost=COST)

    def _take(self, kind: str) -> bool:
        for file in self._signals.glob(f"{kind}-*"):
            try:
                file.unlink()
            except FileNotFoundError:
                continue  # another replica was first
            return True
        return False


def _behaviour(request: Request) -> int:
    pixel = request.images[0].getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[2])


def _control_text(hashed: str, prompt: str) -> str:
    agrees = int(hashed, 16) % 2
    return _text(hashed, prompt, int(VISUAL_TOKENS * RETAIN) if agrees else VISUAL_TOKENS)


def _text(hashed: str, prompt: str, kept: int) -> str:
    return f"{hashed} {hashlib.sha256(prompt.encode()).hexdigest()[:8]} kept {kept}"
