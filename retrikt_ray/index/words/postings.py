"""Postings: which rows of a shard hold a word, and how often; as files that are mapped into memory.

Words are hashed (no vocabulary to keep in step between shards, deltas and queries) and counted by scikit-learn. Each shard has them twice: by word,
its rows, with the largest count and the shortest row for an occurrence, from which follows the most that it can add to a score, whatever the mean length is
by then; and by row, its words, to score a row that was found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import read_arrays, write_arrays
from retrikt_ray.task.texts import Text, joined
from retrikt_ray.task.words import WORD

K1, B = 1.5, 0.75  # whoever changes them removes the compiled code that Numba keeps in __pycache__, too
ARRAYS = ("words", "starts", "most", "spread", "rows", "counts", "lengths", "firsts", "held", "times")  # on the disk
BUCKETS = 2**30  # of the words' hashes: two of a million words share one with a chance of 1 in 1000 each


def counted(texts: list[Text]) -> Any:
    """Word counts (n, BUCKETS), a sparse matrix. Both texts of a pair count as one."""
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(n_features=BUCKETS, alternate_sign=False, norm=None, token_pattern=WORD, ngram_range=(1, 1), dtype=np.float32)
    return words.transform([joined(text, " ") for text in texts])


def runs(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[i] .. starts[i] + counts[i] - 1 for each i, one after the other."""
    return np.arange(int(counts.sum())) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def small(counts: np.ndarray) -> np.ndarray:
    """Whole numbers in the smallest type that holds them."""
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))


@dataclass
class Postings:
    """The words of the rows low .. low + len(lengths) - 1."""

    low: int
    words: np.ndarray  # (W,) int32, sorted hashes
    starts: np.ndarray  # (W + 1,) int64: postings of word i are starts[i] .. starts[i + 1] - 1
    most: np.ndarray  # (W,) largest count of a word in a row
    spread: np.ndarray  # (W,) float32, fewest words of a row for one occurrence
    rows: np.ndarray  # (P,) int32, relative to low; sorted for each word
    counts: np.ndarray  # (P,) of the word in the row
    lengths: np.ndarray  # (n,) words of a row
    firsts: np.ndarray  # (n + 1,) int64: the distinct words of row i are held[firsts[i]] .. held[firsts[i + 1] - 1]
    held: np.ndarray  # (P,) int32, places in `words`, sorted for each row
    times: np.ndarray  # (P,) how often

    def __post_init__(self) -> None:
        for name in ARRAYS:  # as they are when they are mapped: code is compiled for each type of its arguments
            view = getattr(self, name).view()
            view.flags.writeable = False
            setattr(self, name, view)

    @staticmethod
    def of(batches: Iterable[list[Text]], low: int) -> Postings:
        """Count texts, batch by batch."""
        words, counts, held = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], [np.zeros(0, np.int64)]
        for texts in batches:
            if texts:
                matrix = counted(texts)
                words.append(matrix.indices.astype(np.int32))
                counts.append(small(matrix.data))
                held.append(np.diff(matrix.indptr))
        return Postings.sorted(np.concatenate(words), np.concatenate(counts), np.concatenate(held), low)

    @staticmethod
    def sorted(words: np.ndarray, counts: np.ndarray, distinct: np.ndarray, low: int) -> Postings:
        """Of rows in order, as hashes of words and their counts (P,) and distinct words by row (n,)."""
        row = np.repeat(np.arange(len(distinct), dtype=np.int32), distinct)
        lengths = small(np.bincount(row, counts, len(distinct)))
        names, held = np.unique(words, return_inverse=True)
        held = held.astype(np.int32)
        order = np.argsort(held, kind="stable")
        rows, counts_of = row[order], counts[order]
        starts, firsts = (np.append(0, np.cumsum(c)) for c in (np.bincount(held, minlength=len(names)), distinct))
        most, spread = counts_of[:0], lengths[:0]
        if len(names):
            most, spread = (
                np.maximum.reduceat(counts_of, starts[:-1]),
                np.minimum.reduceat(lengths[rows].astype(np.float32) / counts_of, starts[:-1]),
            )
        return Postings(low, names, starts, most, np.asarray(spread, np.float32), rows, counts_of, lengths, firsts, held, counts)

    def write(self, folder: Folder, name: str) -> None:
        write_arrays(folder, name, {k: getattr(self, k) for k in ARRAYS}, low=self.low)

    @staticmethod
    def read(path: str) -> Postings:
        """Mapped into memory."""
        arrays, low = read_arrays(path, ARRAYS, "low")
        return Postings(low=low, **arrays)

    @cached_property
    def total(self) -> float:
        """Words of all rows."""
        return float(self.lengths.sum(dtype=np.float64))

    def words_of(self, rows: np.ndarray) -> np.ndarray:
        """Where the words of some rows are in `held`."""
        return runs(self.firsts[rows], self.firsts[rows + 1] - self.firsts[rows])

    def like(self, other: Postings) -> Postings:
        """The same with whole numbers as wide as others are, at least: no code has to be compiled for them."""
        same = {name: getattr(self, name) for name in ARRAYS}
        wide = {name: same[name].astype(np.promote_types(same[name].dtype, getattr(other, name).dtype)) for name in ARRAYS}
        return Postings(self.low, **wide)

    def find(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of words (T,), and whether any row holds them (T,)."""
        if not len(self.words):
            return np.zeros(len(words), np.int64), np.zeros(len(words), bool)
        at = np.minimum(np.searchsorted(self.words, words), len(self.words) - 1)
        return at, self.words[at] == words
