"""A yes or a no is read off an answer as POPE reads it."""

from __future__ import annotations

import pytest

from sppruner.evaluation.metrics import parse_yes_no


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("No, there is not.", "no"),
        ("There is not a dog in it", "no"),
        ("Yes. There is no doubt.", "yes"),
        ("A northern nose", "yes"),
    ],
)
def test_a_yes_or_a_no_is_read_off_the_first_sentence(said: str, read: str) -> None:
    assert parse_yes_no(said) == read
