"""How short answers are compared: plain exact match, and VQAv2's normalised soft accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Normalisation as in the VQA evaluation code (https://visualqa.org/evaluation.html).
_NUMBERS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
        strict=True,
    )
)
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's i'm i've isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock
    oughtn't shan't she'd she's should've shouldn't somebody'll someone'd someone'll someone's
    something'd something'll that'd that's there'd there're there's they'd they'll they're they've
    twas wasn't we'd we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've
    """.split()
}


def plain(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: how GQA and drawn scenes compare."""
    return " ".join(text.lower().strip().rstrip(".").split())


def normalised(text: str) -> str:
    """An answer as VQAv2 compares it: punctuation gone, number words as digits, no articles,
    apostrophes back in contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    numeric = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        # A mark inside a word separates two words; at a word's edge, or in a number, it is noise.
        noise = numeric or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if noise else " ")
    words = _FULL_STOP.sub("", cleaned).lower().split()
    digits = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in digits if word not in _ARTICLES)


def soft_accuracy(text: str, annotators: Sequence[str]) -> float:
    """min(agreeing / 3, 1), averaged over leaving out each annotator in turn (VQAv2).

    Both sides are normalised. Raises ValueError without annotators.
    """
    if not annotators:
        raise ValueError("soft accuracy needs at least one annotator's answer")
    said = normalised(text)
    agree = [normalised(answer) == said for answer in annotators]
    total = sum(agree)
    return sum(min((total - mine) / 3, 1.0) for mine in agree) / len(agree)


def yes_or_no(text: str) -> str:
    """An answer to a POPE question: "no" if its first sentence says no or not, else "yes"
    (https://github.com/AoiDragon/POPE)."""
    words = text.split(".")[0].replace(",", "").lower().split()
    return "no" if {"no", "not"} & set(words) else "yes"
