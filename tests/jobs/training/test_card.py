"""The shipped model cards say what the recipe would write, around the measured figures."""

from __future__ import annotations

import re
import string

import pytest

from jobs.training.card_text import CARD, FAMILY_TEXT
from jobs.training.history import STAGES, History
from sppruner.tiny import TINY_MODELS


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_a_shipped_card_has_the_words_of_the_template_and_its_history(name: str) -> None:
    folder, family = TINY_MODELS[name], name.removeprefix("tiny-")
    history = History.read(folder)
    told = FAMILY_TEXT[family] | {"family": family, "history": str(history)}
    told |= {stage: f"{getattr(history, stage):,}" for stage in STAGES}
    pattern = ""
    for words, field, _, _ in string.Formatter().parse(CARD):
        pattern += re.escape(words)
        if field is not None:
            # What was measured may be any text, or none.
            pattern += re.escape(told[field]) if field in told else r"[\s\S]*?"
    assert re.fullmatch(pattern, (folder / "README.md").read_text())
