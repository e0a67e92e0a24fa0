"""Guides: of each structured answer, which tokens may come next (llguidance).

Shapes: V vocabulary.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from torch import Tensor

from sppruner.engine.answer_format import AnswerFormat
from sppruner.errors import FormatError

_FORMATS = 256  # a corpus has one, a service a few


class FormatGuide:
    """Follows one answer through its format."""

    def __init__(self, matcher: LLMatcher, end_id: int) -> None:
        self._matcher, self._end_id = matcher, end_id
        self.ended = False
        """Whether the token that was added last ended the answer."""
        self.failure: FormatError | None = None
        """Why the answer cannot go on."""

    def allowed_V(self, vocabulary: int) -> Tensor:
        """Tokens that may come next; only the end token where the answer is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)
        allowed = np.pad(allowed, (0, vocabulary - len(allowed)))
        return torch.from_numpy(allowed)

    def add(self, token: int) -> None:
        """The answer's next token. A format that cannot be followed further ends the answer with
        `failure`; the others of its step go on."""
        matcher = self._matcher
        if token == self._end_id:
            # A matcher that gave up allows nothing but the end, like one whose answer is complete.
            self.ended = True
            if matcher.is_error() or not matcher.is_accepting():
                why = matcher.get_error() or "no token goes on with the answer"
                self.failure = FormatError(f"answer format: {why}")
        elif not matcher.consume_token(token):
            self.failure = FormatError(f"answer format: {matcher.get_error()}")
            self.ended = True

    def copy(self) -> FormatGuide:
        """One that stands where this one does."""
        return FormatGuide(self._matcher.deep_copy(), self._end_id)


class FormatGuides:
    """Starts guides for answers of one model. For several threads."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()
        self._compiled: LRUCache[AnswerFormat, LLMatcher] = LRUCache(_FORMATS)
        self._tokens: Any = None

    def start(self, format: AnswerFormat) -> FormatGuide:
        """Raises FormatError for a format, or a tokenizer, that cannot be followed."""
        with self._lock:
            matcher, tokens = self._compiled.get(format), self._read_tokens()
        if matcher is None:  # compiled while others start
            matcher = LLMatcher(tokens, format.grammar())
            if matcher.is_error():
                raise FormatError(f"answer format: {matcher.get_error()}")
            with self._lock:
                self._compiled[format] = matcher
        return FormatGuide(matcher.deep_copy(), self._tokenizer.eos_token_id)

    def _read_tokens(self) -> Any:
        if self._tokens is None:  # once: it takes a second for a large vocabulary
            try:
                size = max(self._vocabulary, len(self._tokenizer))
                self._tokens = from_tokenizer(self._tokenizer, n_vocab=size)
            except ValueError as error:
                raise FormatError(
                    "answer format: this model's tokens are not spelt in bytes, which formats are "
                    f"made of; use another model ({error})"
                ) from error
        return self._tokens


def format_guides(tokenizer: Any, config: Any) -> FormatGuides:
    """Of a model's config; nothing is read before the first structured answer."""
    return FormatGuides(tokenizer, int(config.get_text_config().vocab_size))
