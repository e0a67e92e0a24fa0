"""How long the prefill of a group takes, so that nobody who is urgent waits long for one."""

from __future__ import annotations

from typing import Final

_NEW_WEIGHT: Final = 0.3


class PrefillPace:
    """A running mean of seconds per token of padded groups."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """A group of so many tokens was prefilled."""
        if tokens < 1:
            return
        seen, before = seconds / tokens, self._seconds_per_token
        self._seconds_per_token = seen if before is None else before + _NEW_WEIGHT * (seen - before)

    def tokens(self, seconds: float) -> int | None:
        """Tokens of a group that takes so long; None where nothing was observed."""
        per_token = self._seconds_per_token
        return None if not per_token else max(1, int(seconds / per_token))
