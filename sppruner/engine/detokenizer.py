"""An answer as it is being said: text token by token, cut in front of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one answer. `text` is what may be shown: what could still turn out to begin a
    stop string is held back until it did not. White space around the answer is not part of it.

    tokenizer: a fast one, of `transformers`.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = stops
        self._said = ""
        self.stopped = False
        self.text = ""

    def add(self, token: int) -> str:
        """Takes one more token; returns what `text` grew by, which may be nothing."""
        self._said += self._stream.step(self._tokenizer, token) or ""
        if not self.text:
            self._said = self._said.lstrip()
        found = [at for stop in self._stops if (at := self._said.find(stop)) >= 0]
        if found:
            self.stopped = True
        return self._show(min(found) if found else len(self._said) - self._unsure())

    def finish(self) -> str:
        """Shows what was held back; nothing more will be said."""
        return "" if self.stopped else self._show(len(self._said))

    def _show(self, upto: int) -> str:
        more = self._said[:upto].rstrip()[len(self.text) :]
        self.text += more
        return more

    def _unsure(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(len(stop) - 1, longest, -1):
                if self._said.endswith(stop[:size]):
                    longest = size
                    break
        return longest
