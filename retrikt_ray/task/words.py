"""Words of a text, whatever its script, and how varied texts are in their words. Pure functions.

Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan are written without spaces between words. There every character counts as a word:
dictionaries that find the words are large, one for each language, and disagree; runs of characters compare texts as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

Ngram = tuple[str, ...]

# Thai and Lao, Tibetan, Burmese, Khmer, Tai, kana, Han and its iteration marks, half-width kana, Burmese extended, rarer Han.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = rf"[{UNSPACED}]|[^\W{UNSPACED}]+"  # a pattern: words without their marks, to look texts up by
UNIT = re.compile(rf"[^\w\s]*[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+")  # vowel signs are no \w: they stay with their letter, as marks do


def words(text: str) -> list[str]:
    """Words in lower case with the marks at them: what stands between spaces, and single characters of scripts that have none."""
    return UNIT.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[Ngram]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def bigrams(texts: Iterable[str]) -> set[Ngram]:
    """The word bigrams of all the texts."""
    return {gram for text in texts for gram in ngrams(words(text), 2)}


def self_bleu(texts: Sequence[str], top: int = 3) -> np.ndarray:
    """Of each text, BLEU-like overlap with the others of the batch: mean over n = 1..top of clipped n-gram precision. (N,) in [0, 1]

    A text too short to have n-grams of some order takes the mean over the orders that it has; an empty text counts as 1 (no variety).
    After Zhu et al. 2018 (Texygen, arXiv 1802.01886), with the arithmetic mean, since a product of small precisions is mostly 0.
    """
    tokens = [words(t) for t in texts]
    result = np.ones(len(texts))
    precisions: list[list[float]] = [[] for _ in texts]
    for n in range(1, top + 1):
        counts = [Counter(ngrams(t, n)) for t in tokens]
        # The largest count of each n-gram, and the largest in any other text, so that a text is not its own reference.
        best: dict[Ngram, list[tuple[int, int]]] = {}
        for i, c in enumerate(counts):
            for gram, k in c.items():
                best.setdefault(gram, []).append((k, i))
        ranked = {g: sorted(v, reverse=True)[:2] for g, v in best.items()}
        for i, c in enumerate(counts):
            if c:
                hit = sum(min(k, next((m for m, j in ranked[g] if j != i), 0)) for g, k in c.items())
                precisions[i].append(hit / sum(c.values()))
    for i, p in enumerate(precisions):
        if p:
            result[i] = sum(p) / len(p)
    return result


def distinct(texts: Iterable[str], n: int = 2) -> float:
    """distinct-n: different n-grams over all n-grams (Li et al. 2016, arXiv 1510.03055)."""
    grams = [g for t in texts for g in ngrams(words(t), n)]
    return len(set(grams)) / len(grams) if grams else 0.0
