"""The lexical side: BM25 over the same rows, in shards that answer as one index.

Words are hashed (no vocabulary to keep in step between shards, deltas and queries), counted by scikit-learn, and kept as postings: for each
word the rows that hold it and how often. A score needs three figures of the whole store: rows, rows that hold the word, and the
mean length. They are sums over shards, so N shards score as one.

BM25 as in Lucene (Kamphuis et al., ECIR 2020, "Which BM25 do you mean?", table 1): a word of the query adds
ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 (1 - b + b length / mean length)). Checked against the library bm25s in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from retrikt_ray.index.search import merge
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.tables import read_arrays, write_arrays
from retrikt_ray.task.texts import Text, joined
from retrikt_ray.task.words import WORD

K1, B = 1.5, 0.75
ARRAYS = ("words", "starts", "rows", "counts", "lengths")  # of postings, on the disk
BUCKETS = 2**30  # of the words' hashes: two of a million words share one with a chance of 1 in 1000 each


def counted(texts: list[Text]) -> Any:
    """Word counts (n, BUCKETS), a sparse matrix. Both texts of a pair count as one."""
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(n_features=BUCKETS, alternate_sign=False, norm=None, token_pattern=WORD, ngram_range=(1, 1), dtype=np.float32)
    return words.transform([joined(text, " ") for text in texts])


@dataclass
class Postings:
    """The words of the rows low .. low + len(lengths) - 1."""

    low: int
    words: np.ndarray  # (W,) int32, sorted hashes
    starts: np.ndarray  # (W + 1,) int64: postings of word i are starts[i] .. starts[i + 1] - 1
    rows: np.ndarray  # int32, relative to low, ascending within a word
    counts: np.ndarray  # float32, of the word in the row
    lengths: np.ndarray  # (n,) float32, words of a row

    @staticmethod
    def of(batches: Iterable[list[Text]], low: int) -> Postings:
        """Count texts, batch by batch."""
        words, rows, counts, lengths, done = [], [], [], [], 0
        for texts in batches:
            if not texts:
                continue
            matrix = counted(texts).tocoo()
            words.append(matrix.col.astype(np.int32))
            rows.append((matrix.row + done).astype(np.int32))
            counts.append(matrix.data)
            lengths.append(np.bincount(matrix.row, matrix.data, minlength=len(texts)).astype(np.float32))
            done += len(texts)

        def joined(parts: list[np.ndarray], kind: Any) -> np.ndarray:
            return np.concatenate(parts) if parts else np.zeros(0, kind)

        word, row = joined(words, np.int32), joined(rows, np.int32)
        order = np.lexsort((row, word))
        unique, first = np.unique(word[order], return_index=True)
        starts = np.append(first, len(word)).astype(np.int64)
        return Postings(low, unique, starts, row[order], joined(counts, np.float32)[order], joined(lengths, np.float32))

    def write(self, folder: Folder, name: str) -> None:
        write_arrays(folder, name, {k: getattr(self, k) for k in ARRAYS}, low=self.low)

    @staticmethod
    def read(path: str) -> Postings:
        """Mapped into memory."""
        arrays, low = read_arrays(path, ARRAYS, "low")
        return Postings(low=low, **arrays)

    def find(self, word: int) -> slice:
        """Where the postings of a word are; empty where no row holds it."""
        at = int(np.searchsorted(self.words, word))
        found = at < len(self.words) and self.words[at] == word
        return slice(int(self.starts[at]), int(self.starts[at + 1])) if found else slice(0, 0)


@dataclass
class Lexical:
    """Postings of all rows, opened for search."""

    shards: list[Postings]
    alive: np.ndarray | None = None  # (rows,) bool; rows that were deleted neither are found nor count in the figures of the whole store

    def __post_init__(self) -> None:
        self.rows = sum(len(s.lengths) for s in self.shards)
        self.live = self.rows if self.alive is None else int(self.alive.sum())
        words = sum(float((s.lengths * self.living(s)).sum(dtype=np.float64)) for s in self.shards)
        self.mean = max(1.0, words / max(1, self.live))

    def living(self, shard: Postings) -> Any:
        """(n,) bool for the rows of a shard, or True for all."""
        return True if self.alive is None else self.alive[shard.low : shard.low + len(shard.lengths)]

    @staticmethod
    def unsealed(folder: Folder) -> Lexical:
        """Open postings that this process has just verified, or its own job has just written."""
        local = folder.local()
        try:
            return Lexical([Postings.read(str(local / n)) for n in folder.read_json("index.json")["words"]])
        except (pa.ArrowInvalid, KeyError) as error:
            raise ArtifactError(f"{folder} has postings that are not of this version ({error})") from None

    def edited(self, texts: list[Text], alive: np.ndarray) -> Lexical:
        """The same with more rows at the end, and without those that are not alive."""
        return Lexical([*self.shards, Postings.of([texts], self.rows)], alive)

    def search(self, texts: list[Text], k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions (Q, k) and BM25 scores (Q, k), best first, ties by position; -1 and -inf where no further row shares a word.

        allowed: (rows,) bool, the rows that may be found; None: all.
        """
        queries = counted(texts)
        answers = []
        for i in range(len(texts)):
            span = slice(queries.indptr[i], queries.indptr[i + 1])
            terms = zip(queries.indices[span].tolist(), queries.data[span].tolist(), strict=True)
            found = self.query(sorted(terms), k, allowed)  # scores are summed in one order
            answers.append(merge([f[0][None] for f in found], [f[1][None] for f in found], k))
        return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])

    def query(self, terms: list[tuple[int, float]], k: int, allowed: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per shard, positions and scores of the k best rows and all that tie with the k-th. terms: (word, times in the query)."""
        places = [[s.find(word) for s in self.shards] for word, _ in terms]
        holders = []  # live rows that hold the word
        for place in places:
            held = [(s, s.rows[p]) for s, p in zip(self.shards, place, strict=True)]
            holders.append(sum(len(rows) if self.alive is None else int(self.living(s)[rows].sum()) for s, rows in held))
        out = []
        for j, shard in enumerate(self.shards):
            scores = np.zeros(len(shard.lengths), np.float32)
            for (_, times), place, n in zip(terms, places, holders, strict=True):
                rows, counts = shard.rows[place[j]], shard.counts[place[j]]
                weight = np.float32(times * np.log(1 + (self.live - n + 0.5) / (n + 0.5)))
                scores[rows] += weight * counts / (counts + np.float32(K1) * (1 - B + B * shard.lengths[rows] / np.float32(self.mean)))
            scores *= self.living(shard)
            if allowed is not None:
                scores *= allowed[shard.low : shard.low + len(scores)]
            some = np.flatnonzero(scores)
            if len(some) > k:
                some = some[scores[some] >= np.partition(scores[some], len(some) - k)[len(some) - k]]
            out.append(((some + shard.low).astype(np.int64), scores[some]))
        return out or [(np.zeros(0, np.int64), np.zeros(0, np.float32))]
