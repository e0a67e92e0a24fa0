"""Yes and no, read off an answer; `sppruner.vqa` scores short answers."""

from __future__ import annotations


def parse_yes_no(text: str) -> str:
    """An answer to a POPE question: "no" if its first sentence contains "no" or "not", else "yes"
    (https://github.com/AoiDragon/POPE)."""
    words = text.split(".")[0].replace(",", "").lower().split()
    return "no" if {"no", "not"} & set(words) else "yes"
