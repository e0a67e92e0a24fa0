"""CIDEr-D and BLEU-4 of captions.

Captions are lower-cased and split into words; the reference implementation runs the Penn Treebank
tokeniser, a Java program, which also splits clitics ("man's"), so figures differ from it slightly.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Gram: TypeAlias = tuple[str, ...]

_LONGEST = 4
_SIGMA = 6.0
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")


def words(caption: str) -> list[str]:
    return _WORD.findall(caption.lower())


def _grams(caption: Sequence[str], n: int) -> Counter[Gram]:
    return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))


class CiderD:
    """CIDEr-D (Vedantam et al., CVPR 2015, arXiv 1411.5726): tf-idf weighted n-grams, clipped to
    the reference's counts, times a penalty on the difference in length; n from 1 to 4, mean over
    references, times 10.

    An n-gram's document frequency is the number of images with a reference that holds it, so a
    score belongs to the set of images it was made with. With one image every idf is 0.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        """references: the captions of each image, by any name of the image."""
        self._images = len(references)
        self._holding: Counter[Gram] = Counter()
        for captions in references.values():
            split = [words(caption) for caption in captions]
            self._holding.update(
                {gram for c in split for n in range(1, _LONGEST + 1) for gram in _grams(c, n)}
            )

    def score(self, caption: str, references: Sequence[str]) -> float:
        """0 to 10; reports often print it times 100."""
        said = words(caption)
        mine = [self._weights(said, n) for n in range(1, _LONGEST + 1)]
        total = 0.0
        for reference in references:
            held = words(reference)
            penalty = math.exp(-((len(said) - len(held)) ** 2) / (2 * _SIGMA**2))
            theirs = (self._weights(held, n) for n in range(1, _LONGEST + 1))
            total += penalty * sum(map(_clipped_cosine, mine, theirs)) / _LONGEST
        return 10 * total / len(references)

    def _weights(self, caption: Sequence[str], n: int) -> dict[Gram, float]:
        log_images = math.log(max(1, self._images))
        return {
            gram: count * (log_images - math.log(max(1, self._holding[gram])))
            for gram, count in _grams(caption, n).items()
        }


def _clipped_cosine(said: Mapping[Gram, float], held: Mapping[Gram, float]) -> float:
    norms = math.hypot(*said.values()) * math.hypot(*held.values())
    if norms == 0:
        return 0.0
    return sum(min(w, held[g]) * held[g] for g, w in said.items() if g in held) / norms


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 (Papineni et al., ACL 2002): clipped n-gram precisions over the whole corpus,
    geometric mean, brevity penalty against the closest reference lengths. 0 to 1, unsmoothed."""
    matched, made = [0] * _LONGEST, [0] * _LONGEST
    length = closest = 0
    for caption, theirs in zip(captions, references, strict=True):
        said, held = words(caption), [words(reference) for reference in theirs]
        length += len(said)
        closest += min(map(len, held), key=lambda size: (abs(size - len(said)), size))
        for n in range(1, _LONGEST + 1):
            most: Counter[Gram] = Counter()
            for reference in held:
                most |= _grams(reference, n)
            mine = _grams(said, n)
            matched[n - 1] += (mine & most).total()
            made[n - 1] += mine.total()
    if not all(matched):
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(matched, made, strict=True)) / _LONGEST
    return math.exp(min(0.0, 1 - closest / length) + precision)
