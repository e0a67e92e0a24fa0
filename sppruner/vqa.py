"""Scores of short answers: the one scorer that job summaries and evaluations share. No torch.

With three references or more, VQAv2's official rules (https://visualqa.org/evaluation.html; Antol
et al. 2015): both sides are normalised (the official script leaves that out where all references
are equal), and accuracy is min(agreeing / 3, 1) averaged over leaving out each reference in turn.
With one or two references, where three can never agree: an exact match after a lighter
normalisation, which keeps symbols ("C++", "50 %") apart. A blank answer scores 0.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

# References from which VQAv2's agreement is defined.
_AGREEMENT = 3
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten".split(), 1)
}
# Of a printed list: Python's parser needs memory, and time, far beyond a text's own size.
_PRINTED_CHARACTERS = 2**14
_QUOTES_AND_BRACES = ("'", '"', "{")
# A string and the comma behind it; all that follows a quote which nothing closes, so that the
# search does not begin anew at each quote in there.
_QUOTED = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|['"].*)\s*,?""", re.DOTALL)
_NEXT_MAPPING = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|['"].*)|\}\s+\{""", re.DOTALL)
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_MARKS = re.compile(r"""[,;!?"()\[\]{}]|:(?!\d)""")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The official table, by its right-hand sides: its keys are these words with one apostrophe left
# out. Its four keys with a capital I are absent, since words are looked up in lower case.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
    """.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def references_of(value: object) -> list[str]:
    """The reference answers that a corpus gives for one row; empty where it gives none.

    value: a string, a number, a mapping with the key "answer" (VQAv2's annotations, with a
    confidence beside it), a list of these, or the text of a list of strings or mappings: JSON, or
    what Python and NumPy print, which a column of lists becomes in CSV. None, NaN and blank strings
    are dropped.

    Never raises, whatever a row holds: it would cost the accuracy of all rows.
    """
    found: list[str] = []
    rest: list[object] = [value]  # no recursion: lists may be nested hundreds of levels deep
    while rest:
        item = rest.pop()
        if isinstance(item, str) and item.lstrip().startswith("["):
            listed = _listed(item.strip())
            item = item if listed is None else listed
        if isinstance(item, Mapping):
            rest.append(item.get("answer"))
        elif isinstance(item, list | tuple):
            rest.extend(reversed(item))
        else:
            text = _text(item)
            found += [text] if text.strip() else []
    return found


def _text(value: object) -> str:
    """A reference as text; empty for None, NaN and a number of thousands of digits, which Python
    does not print."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        # A column of whole numbers with gaps is read as floats: 2.0 is the answer "2".
        value = int(value)
    with suppress(ValueError):
        return str(value)
    return ""


def _listed(text: str) -> list[object] | None:
    """The list that a text writes; None where it is none of strings or mappings. A list of numbers
    is an answer itself, such as the corners of a box."""
    for parse in (json.loads, _printed):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            listed = parse(text)
            if isinstance(listed, list) and all(isinstance(item, str | dict) for item in listed):
                return listed
    return None


def _printed(text: str) -> object:
    """What Python or NumPy printed as this text, of a list of strings or mappings. Raises what
    `ast.literal_eval` raises."""
    first = text[1:].lstrip()[:1]
    if first not in _QUOTES_AND_BRACES or len(text) > _PRINTED_CHARACTERS:
        raise ValueError("a text that lists neither strings nor mappings, or too much")
    # NumPy prints no commas, between strings, which Python would join, nor between mappings.
    if first == "{":
        return ast.literal_eval(_NEXT_MAPPING.sub(lambda found: found[1] or "},{", text))
    return ast.literal_eval(_QUOTED.sub(r"\1,", text))


def score(answer: str | None, references: Sequence[str]) -> float:
    """The accuracy of an answer in [0, 1], see above; 0.0 for None or a blank, which is no answer.

    Raises ValueError without references.
    """
    if not references:
        raise ValueError("an answer cannot be scored without a reference")
    if answer is None or not answer.strip():
        return 0.0
    if len(references) < _AGREEMENT:
        return float(normalise_lightly(answer) in map(normalise_lightly, references))
    given = normalise(answer)
    agrees = [normalise(reference) == given for reference in references]
    total = sum(agrees)
    return sum(min((total - own) / _AGREEMENT, 1.0) for own in agrees) / len(agrees)


def normalise_lightly(text: str) -> str:
    """Lower case, single spaces, no articles, no commas in numbers, no marks that end or enclose
    phrases, no full stop at the end. Nothing is taken from a text of which nothing would be left,
    such as the choice "A"."""
    lowered = " ".join(text.lower().split())
    words = _MARKS.sub(" ", _COMMA_IN_NUMBER.sub("", lowered)).strip().rstrip(".").split()
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or lowered


def normalise(text: str) -> str:
    """An answer as VQAv2 compares it: no punctuation, number words as digits, no articles,
    apostrophes restored in contractions."""
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
