"""Passages of documents: sentences in a row that are together about as long as the texts of a task. Pure functions.

Lengths are drawn from the labelled rows', so that passages are as varied in them: a task of long texts gets long passages, one of single
sentences sentences. A passage never leaves its document. Sentences end at their marks in any script; where a script has neither spaces between
words nor such marks (Thai, say), at the spaces that it does have.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from retrikt_ray.task.texts import tidy
from retrikt_ray.task.words import UNSPACED, words

BAND = (0.05, 0.95)  # quantiles of the labelled rows' lengths that a passage's lies between
CLOSING = r"[\"'”’»)\]」』）]*"
SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])"  # a title or an initial ends none
    rf"(?:[.!?…]+{CLOSING}\s+(?=[\"'“‘«(\[¿¡]*[^\W_a-z])"  # marks, then a capital, a number, or a letter of a script without capitals
    r"|(?<=\s)[.!?]\s+"  # a mark that stands alone, as in texts that are cut into tokens
    r"|(?<=[a-z]{2})[.!?]+(?=[A-Z][a-z])"  # a space that was lost
    rf"|[。！？｡।॥؟۔။។]+{CLOSING}\s*"
    rf"|(?<=[{UNSPACED}])\s+(?=[{UNSPACED}]))"
)


def sentences(document: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each sentence of a document."""
    begin = 0
    for mark in SENTENCE_END.finditer(document):
        yield begin, mark.end()
        begin = mark.end()
    if begin < len(document):
        yield begin, len(document)


def band(lengths: Sequence[int]) -> tuple[int, int]:
    """Fewest and most words of a passage, from the words of each labelled row."""
    ranked = sorted(lengths)
    low, high = (ranked[round(q * (len(ranked) - 1))] for q in BAND)
    return low, high


def passages(document: str, lengths: Sequence[int], rng: random.Random) -> Iterator[str]:
    """The passages of a document whose lengths are in the band, tidied. lengths: words of each labelled row.

    Of each a length is drawn, and sentences are added as long as they bring it nearer to that.
    """
    low, high = band(lengths)
    begin, end, count, wanted = 0, 0, 0, rng.choice(lengths)
    for first, last in [*sentences(document), (len(document), len(document))]:
        more = len(words(document[first:last]))
        if count and (first == last or abs(count + more - wanted) >= abs(count - wanted)):
            if low <= count <= high:
                yield tidy(document[begin:end])
            begin, count, wanted = first, 0, rng.choice(lengths)
        end, count = last, count + more
