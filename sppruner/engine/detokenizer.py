"""Incremental detokenization: an answer's text token by token, cut in front of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tokenizers.decoders import DecodeStream

_NO_CHARACTER: Final = "\ufffd"


class Detokenizer:
    """The text of one answer.

    text: what may be shown so far, without white space around the answer. Characters that may begin
    a stop string are held back until it is clear that they do not. stopped: whether the answer
    contains a stop string.

    tokenizer: a fast one of `transformers`. stops: stop strings.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = stops
        self._decoded = ""
        self.stopped = False
        self.text = ""

    def add(self, token: int) -> str:
        """Decodes one more token; returns what `text` grew by, which may be nothing."""
        try:
            piece = self._stream.step(self._tokenizer, token)
        except Exception:  # of no class of its own: the bytes before this token are no UTF-8
            self._stream = DecodeStream(skip_special_tokens=True)
            # Behind another token: some decoders strip white space from the first one.
            for plain in self._tokenizer.encode("a", add_special_tokens=False).ids:
                self._stream.step(self._tokenizer, plain)
            piece = _NO_CHARACTER + (self._stream.step(self._tokenizer, token) or "")
        self._decoded += piece or ""
        if not self.text:
            self._decoded = self._decoded.lstrip()
        found = [at for stop in self._stops if (at := self._decoded.find(stop)) >= 0]
        if found:
            self.stopped = True
        return self._show(min(found) if found else len(self._decoded) - self._held_back())

    def finish(self) -> str:
        """Ends the answer; returns the characters that were held back."""
        return "" if self.stopped else self._show(len(self._decoded))

    def _show(self, end: int) -> str:
        more = self._decoded[:end].rstrip()[len(self.text) :]
        self.text += more
        return more

    def _held_back(self) -> int:
        """Number of characters at the end that may begin a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:size]):
                    longest = size
                    break
        return longest
