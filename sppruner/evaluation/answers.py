"""How a yes or a no is read off an answer; short answers are scored by `sppruner.vqa`."""

from __future__ import annotations


def yes_or_no(text: str) -> str:
    """An answer to a POPE question: "no" if its first sentence says no or not, else "yes"
    (https://github.com/AoiDragon/POPE)."""
    words = text.split(".")[0].replace(",", "").lower().split()
    return "no" if {"no", "not"} & set(words) else "yes"
