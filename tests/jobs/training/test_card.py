"""The shipped model cards match the template of the recipe around their measured figures."""

from __future__ import annotations

import re
import string

import pytest

from jobs.training.card_text import CARD, FAMILY_TEXT
from jobs.training.history import STAGES, History
from sppruner.tiny import TINY_MODELS


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_a_shipped_card_has_the_text_of_the_template_and_its_history(name: str) -> None:
    folder, family = TINY_MODELS[name], name.removeprefix("tiny-")
    history = History.read(folder)
    known = FAMILY_TEXT[family] | {"family": family, "history": str(history)}
    known |= {stage: f"{getattr(history, stage):,}" for stage in STAGES}
    pattern = ""
    for literal, field, _, _ in string.Formatter().parse(CARD):
        pattern += re.escape(literal)
        if field is not None:
            # Measured parts may be any text, or empty.
            pattern += re.escape(known[field]) if field in known else r"[\s\S]*?"
    assert re.fullmatch(pattern, (folder / "README.md").read_text())
