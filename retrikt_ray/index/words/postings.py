"""Postings: which rows of a shard hold a word, and how often; as files that are mapped into memory.

Words are hashed (no vocabulary to keep in step between shards, deltas and queries) and counted by scikit-learn. Each shard has them four times over:
- by word: its rows, those first to whose scores it adds most, cut into lists of 64, 64, 128, 256 ... postings, each with the largest count and
  the smallest length in it, from which follows the most that a row of the list can get, whatever the mean length is by then;
- by row: its words, to score a row that was found;
- as bitmaps, of the words that many rows hold, to tell quickly that a row does not;
- as lengths of the rows.
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

K1, B = 1.5, 0.75
ARRAYS = (
    "words",
    "lists",
    "starts",
    "most",
    "least",
    "rows",
    "counts",
    "lengths",
    "firsts",
    "held",
    "times",
    "common",
    "bits",
    "twice",
)  # on the disk
BUCKETS = 2**30  # of the words' hashes: two of a million words share one with a chance of 1 in 1000 each
LIST = 64  # postings in a word's first list, and in its second; each further one is as long as all before it
COMMON, COMMON_ROWS = 1 / 128, 1024  # of a shard's rows, and rows, that hold a word which is kept as a bitmap, too


def counted(texts: list[Text]) -> Any:
    """Word counts (n, BUCKETS), a sparse matrix. Both texts of a pair count as one."""
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(n_features=BUCKETS, alternate_sign=False, norm=None, token_pattern=WORD, ngram_range=(1, 1), dtype=np.float32)
    return words.transform([joined(text, " ") for text in texts])


def norms_of(lengths: np.ndarray, mean: float) -> np.ndarray:
    """What BM25 adds to a count in the denominator, (n,) float32, for rows of some lengths."""
    return np.asarray(np.float32(K1) * (1 - B + B * lengths / np.float32(mean)))


def added(weights: Any, counts: np.ndarray, lengths: np.ndarray, mean: float) -> np.ndarray:
    """What words add to scores, float32: weights (of the words), counts and lengths (of the rows) of one shape."""
    counts = counts.astype(np.float32)
    return np.asarray(weights * counts / (counts + norms_of(lengths, mean)))


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
    lists: np.ndarray  # (W + 1,) int64: lists of word i are lists[i] .. lists[i + 1] - 1
    starts: np.ndarray  # (L + 1,) int64: postings of list j are starts[j] .. starts[j + 1] - 1
    most: np.ndarray  # (L,) largest count in a list
    least: np.ndarray  # (L,) float32, smallest length of its rows
    rows: np.ndarray  # (P,) int32, relative to low
    counts: np.ndarray  # (P,) of the word in the row
    lengths: np.ndarray  # (n,) float32, words of a row
    firsts: np.ndarray  # (n + 1,) int64: the distinct words of row i are held[firsts[i]] .. held[firsts[i + 1] - 1]
    held: np.ndarray  # (P,) int32, places in `words`
    times: np.ndarray  # (P,) how often
    common: np.ndarray  # (H,) int32, sorted places of the words that many rows hold
    bits: np.ndarray  # (H B,) uint8: B bytes for each of them, a bit for each row
    twice: np.ndarray  # (H B,) uint8: the same of the rows that hold the word more than once

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
        lengths = np.bincount(row, counts, len(distinct)).astype(np.float32)
        names, held = np.unique(words, return_inverse=True)
        held = held.astype(np.int32)
        mean = max(1.0, float(lengths.sum(dtype=np.float64)) / max(1, len(lengths)))
        order = np.lexsort((-added(np.float32(1), counts, lengths[row], mean), held))  # stable: equal ones stay in the order of their rows
        word = held[order]
        place = np.arange(len(word)) - np.searchsorted(word, np.arange(len(names)))[word]  # among the word's own
        level = np.ceil(np.log2(np.maximum(place + 1, LIST) / LIST)).astype(np.int8)
        begins = np.flatnonzero(np.r_[True, (word[1:] != word[:-1]) | (level[1:] != level[:-1])][: len(word)])
        lists = np.searchsorted(word[begins], np.arange(len(names) + 1))
        rows, counts_of = row[order], counts[order]
        most, least = (f.reduceat(a, begins) if len(begins) else a[:0] for f, a in ((np.maximum, counts_of), (np.minimum, lengths[rows])))
        firsts, starts = np.append(0, np.cumsum(distinct)), np.append(begins, len(word))
        common = np.flatnonzero(np.diff(starts[lists]) > max(COMMON_ROWS, COMMON * len(lengths))).astype(np.int32)
        bits, twice = np.zeros((2, len(common), -(-len(lengths) // 8)), np.uint8)
        for line, double, c in zip(bits, twice, common.tolist(), strict=True):
            part = slice(int(starts[lists[c]]), int(starts[lists[c + 1]]))
            times = np.zeros(len(lengths), np.int64)
            times[rows[part]] = counts_of[part]
            line[:], double[:] = (np.packbits(times > more, bitorder="little") for more in (0, 1))
        return Postings(
            low, names, lists, starts, most, least, rows, counts_of, lengths, firsts, held, counts, common, bits.ravel(), twice.ravel()
        )

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

    def lines(self, places: np.ndarray) -> np.ndarray:
        """Which bitmaps words have, by their places; -1: none."""
        at = np.searchsorted(self.common, places)
        found = np.append(self.common, -1)[at] == places
        return np.where(found, at, -1)

    def holding(self, lines: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which rows hold words that have these bitmaps, and which more than once: 1 or 0, (words, rows) uint8."""
        byte, bit = rows >> 3, (rows & 7).astype(np.uint8)
        held, twice = (b.reshape(len(self.common), -1)[lines[:, None], byte] >> bit & 1 for b in (self.bits, self.twice))
        return held, twice

    def norms(self, rows: np.ndarray, mean: float) -> np.ndarray:
        """What BM25 adds to a count in the denominator, (n,) float32."""
        return norms_of(self.lengths[rows], mean)

    def words_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The words of some rows, each row's by hash: where they are in `held`, and which of `rows` each belongs to."""
        counts = self.firsts[rows + 1] - self.firsts[rows]
        return runs(self.firsts[rows], counts), np.repeat(np.arange(len(rows)), counts)

    def find(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of words (T,), and whether any row holds them (T,)."""
        if not len(self.words):
            return np.zeros(len(words), np.int64), np.zeros(len(words), bool)
        at = np.minimum(np.searchsorted(self.words, words), len(self.words) - 1)
        return at, self.words[at] == words
