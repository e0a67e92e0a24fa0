"""CIDEr-D and BLEU-4 of captions.

Captions are lower-cased and split into words. The reference implementation runs the Penn Treebank
tokeniser, a Java program, which also splits clitics ("man's"): its figures differ slightly.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

NGram: TypeAlias = tuple[str, ...]

_MAX_N = 4
_SIGMA = 6.0
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")


def split_words(caption: str) -> list[str]:
    return _WORD.findall(caption.lower())


def _ngrams(caption: Sequence[str], n: int) -> Counter[NGram]:
    return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))


class CiderD:
    """CIDEr-D (Vedantam et al., CVPR 2015, arXiv 1411.5726): tf-idf weighted n-grams, clipped to
    the reference's counts, times a penalty on the difference in length; n from 1 to 4, mean over
    references, times 10.

    An n-gram's document frequency is the number of images with a reference that contains it, so a
    score is valid only for its own set of images. With one image every idf is 0.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        """references: the captions of each image, by the image's id."""
        self._images = len(references)
        self._document_frequency: Counter[NGram] = Counter()
        for captions in references.values():
            split = [split_words(caption) for caption in captions]
            self._document_frequency.update(
                {ngram for c in split for n in range(1, _MAX_N + 1) for ngram in _ngrams(c, n)}
            )

    def score(self, caption: str, references: Sequence[str]) -> float:
        """The score of a caption, 0 to 10; reports often print it times 100."""
        candidate = split_words(caption)
        weights = [self._weights(candidate, n) for n in range(1, _MAX_N + 1)]
        total = 0.0
        for reference in references:
            words = split_words(reference)
            penalty = math.exp(-((len(candidate) - len(words)) ** 2) / (2 * _SIGMA**2))
            reference_weights = (self._weights(words, n) for n in range(1, _MAX_N + 1))
            total += penalty * sum(map(_clipped_cosine, weights, reference_weights)) / _MAX_N
        return 10 * total / len(references)

    def _weights(self, caption: Sequence[str], n: int) -> dict[NGram, float]:
        log_images = math.log(max(1, self._images))
        return {
            gram: count * (log_images - math.log(max(1, self._document_frequency[gram])))
            for gram, count in _ngrams(caption, n).items()
        }


def _clipped_cosine(candidate: Mapping[NGram, float], reference: Mapping[NGram, float]) -> float:
    norms = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    if norms == 0:
        return 0.0
    shared = ((weight, reference[g]) for g, weight in candidate.items() if g in reference)
    return sum(min(weight, limit) * limit for weight, limit in shared) / norms


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 (Papineni et al., ACL 2002): clipped n-gram precisions over the whole corpus,
    geometric mean, brevity penalty against the closest reference lengths. 0 to 1, unsmoothed."""
    matches, totals = [0] * _MAX_N, [0] * _MAX_N
    length = reference_length = 0
    for caption, caption_references in zip(captions, references, strict=True):
        candidate = split_words(caption)
        split = [split_words(reference) for reference in caption_references]
        length += len(candidate)
        reference_length += min(
            map(len, split), key=lambda size: (abs(size - len(candidate)), size)
        )
        for n in range(1, _MAX_N + 1):
            limits: Counter[NGram] = Counter()
            for reference in split:
                limits |= _ngrams(reference, n)
            ngrams = _ngrams(candidate, n)
            matches[n - 1] += (ngrams & limits).total()
            totals[n - 1] += ngrams.total()
    if not all(matches):
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / _MAX_N
    return math.exp(min(0.0, 1 - reference_length / length) + precision)
