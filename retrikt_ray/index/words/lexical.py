"""The lexical side: BM25 over the same rows, in shards that answer as one index.

A score needs three figures of the whole store: rows, rows that hold the word, and the mean length. They are sums over shards, so N shards
score as one. BM25 as in Lucene (Kamphuis et al., ECIR 2020, "Which BM25 do you mean?", table 1): a word of the query adds
ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 (1 - b + b length / mean length)). Checked against the library bm25s in the tests.

A search is exact, and reads few postings (MaxScore: Turtle & Flood, 1995). Words are read in the order of the most that they may add, until
the words that are left cannot bring a row that was not seen among the k best. Of those that were seen, the rows that still may be are scored by their own words.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa

from retrikt_ray.index.search import merge
from retrikt_ray.index.words.postings import K1, B, Postings, counted
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.task.texts import Text

DEAR = 128  # postings that are read in the time that it takes to score a row by its words
FIRST = 16  # times k: of so many rows that were seen first, in the lists of rare words, those are taken that seem best
ALL = np.zeros(0, bool)  # of rows: none is left out
SCRATCH = threading.local()


def scratch(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of `count` rows at least, all 0, and room for as many rows: kept for the next question, so that one costs what it reads."""
    if len(getattr(SCRATCH, "sums", ALL)) < count:
        SCRATCH.sums, SCRATCH.seen = np.zeros(count, np.float32), np.zeros(count, np.int32)
    return SCRATCH.sums, SCRATCH.seen


@dataclass
class Lexical:
    """Postings of all rows, opened for search."""

    shards: list[Postings]
    gone: np.ndarray | None = None  # sorted positions of deleted rows: they neither are found nor count in the figures of the whole store

    def __post_init__(self) -> None:
        self.rows = sum(len(s.lengths) for s in self.shards)
        self.lows = np.array([s.low for s in self.shards], np.int64)
        gone = [] if self.gone is None else [(self.shards[i], rows) for i, rows in self.by_shard(self.gone)]
        self.live = self.rows - sum(len(rows) for _, rows in gone)
        words = sum(s.total for s in self.shards) - sum(float(s.lengths[rows].sum(dtype=np.float64)) for s, rows in gone)
        self.mean = max(1.0, words / max(1, self.live))
        self.lost = np.sort(np.concatenate([np.zeros(0, np.int32), *(s.words[s.held[s.words_of(rows)]] for s, rows in gone)]))

    @cached_property
    def alive(self) -> np.ndarray | None:
        """(rows,) bool, or None: all are."""
        if self.gone is None or not len(self.gone):
            return None
        mask = np.ones(self.rows, bool)
        mask[self.gone] = False
        return mask

    def by_shard(self, positions: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Shards, by number, and rows in them, of sorted positions."""
        cuts = np.append(np.searchsorted(positions, self.lows), len(positions)).tolist()
        return [(i, positions[a:b] - self.shards[i].low) for i, (a, b) in enumerate(pairwise(cuts)) if a < b]

    @staticmethod
    def unsealed(folder: Folder) -> Lexical:
        """Open postings that this process has just verified, or its own job has just written."""
        local = folder.local()
        try:
            return Lexical([Postings.read(str(local / n)) for n in folder.read_json("index.json")["words"]])
        except (pa.ArrowInvalid, KeyError) as error:
            raise ArtifactError(f"{folder} has postings that are not of this version ({error})") from None

    def edited(self, texts: list[Text], gone: np.ndarray) -> Lexical:
        """The same with more rows at the end, and without those at some positions. Costs what these rows do."""
        more = Postings.of([texts], self.rows)
        return Lexical([*self.shards, more.like(self.shards[0]) if self.shards else more], np.unique(gone))

    def search(self, texts: list[Text], k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions (Q, k) and BM25 scores (Q, k), best first, ties by position; -1 and -inf where no further row shares a word.

        allowed: (rows,) bool, the rows that may be found; None: all that are not deleted.
        """
        queries = counted(texts)
        if self.alive is not None:
            allowed = self.alive if allowed is None else self.alive & allowed[: self.rows]
        answers = []
        for low, high in pairwise(queries.indptr):
            found, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
            if low < high and self.shards:
                found, scores = Asked(self, queries.indices[low:high], queries.data[low:high]).best(k, allowed)
            answers.append(merge([found[None]], [scores[None]], k))
        return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])


class Asked:
    """A query of T words, and where their postings are in the S shards of an index."""

    def __init__(self, index: Lexical, words: np.ndarray, times: np.ndarray) -> None:
        """words: (T,) sorted hashes; times: (T,) in the query."""
        self.index = index
        found = [s.find(words) for s in index.shards]
        self.places, self.there = (np.stack(part) for part in zip(*found, strict=True))  # (S, T)
        self.begin, self.end = (
            np.stack([s.starts[at + more * t] for s, (at, t) in zip(index.shards, found, strict=True)]) for more in (0, 1)
        )
        self.sizes = self.end - self.begin
        lost = np.searchsorted(index.lost, words, "right") - np.searchsorted(index.lost, words)
        n = self.sizes.sum(0) - lost
        self.weights = (times * np.log(1 + (index.live - n + 0.5) / (n + 0.5))).astype(np.float32)
        self.mean = np.float32(index.mean)
        self.slack = 1 + (len(words) + 8) * 2.0**-23  # sums of a score in float32, in whatever order, are not further apart
        bounds = np.zeros(len(words))  # the most that a word adds to a score
        for shard, at, there in zip(index.shards, self.places, self.there, strict=True):
            least = K1 * (1 - B) / shard.most[at[there]] + K1 * B * shard.spread[at[there]] / index.mean
            bounds[there] = np.maximum(bounds[there], self.weights[there] / (1 + least))
        self.order = np.argsort(-bounds, kind="stable")
        self.left = np.append(np.cumsum(bounds[self.order][::-1])[::-1], 0) * self.slack  # what words from the i-th on add at most

    def best(self, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores of the k best rows, and of all that tie with the k-th, by position. allowed: (rows,) bool; None: all."""
        positions, scores, least = np.zeros(0, np.int64), np.zeros(0, np.float32), 0.0
        for s in np.argsort([-len(shard.lengths) for shard in self.index.shards], kind="stable").tolist():
            rows = self.candidates(s, k, least, allowed)
            positions = np.append(positions, rows + np.int64(self.index.shards[s].low))
            scores = np.append(scores, self.scores(s, rows))
            least = max(least, kth(scores, k))
            positions, scores = positions[scores >= least], scores[scores >= least]
        order = np.argsort(positions)
        return positions[order], scores[order]

    def candidates(self, s: int, k: int, least: float, allowed: np.ndarray | None) -> np.ndarray:
        """Rows of a shard that may score `least`, and be among its k best."""
        from retrikt_ray.index.words.kernels import add, keep

        shard, unknown = self.index.shards[s], not least
        mask = ALL if allowed is None else allowed[shard.low : shard.low + len(shard.lengths)]
        sums, seen = scratch(len(shard.lengths))
        n = 0
        try:
            for step, word in enumerate([*self.order.tolist(), None]):
                size = 0 if word is None else int(self.sizes[s, word])
                new = self.left[step] >= least
                if new and unknown and k <= n <= size:  # else to look costs more than to read
                    first = seen[: min(n, FIRST * k)]
                    least = max(least, self.reached(s, k, first, sums[first]))
                    new = self.left[step] >= least
                if not new or word is None:
                    n = keep(seen, n, sums, np.float32((least / self.slack - self.left[step]) / self.slack))
                    if DEAR * n <= size or word is None:
                        break
                part = slice(self.begin[s, word], self.end[s, word])
                n = add(shard.rows[part], shard.counts[part], shard.lengths, mask, self.weights[word], self.mean, sums, seen, n, new)
            rows, found = seen[:n].copy(), sums[seen[:n]]
            sums[seen[:n]] = 0
        except BaseException:  # Ctrl-C above all: which sums are not 0 is not known then
            SCRATCH.__dict__.clear()
            raise
        if n > 2 * k:
            least = self.reached(s, k, rows, found)
            rows = rows[(found * self.slack + self.left[step]) * self.slack >= least]
        return rows

    def reached(self, s: int, k: int, rows: np.ndarray, like: np.ndarray) -> float:
        """What k rows of a shard score at least: those of some rows that seem best by (n,) sums. 0 where there are fewer."""
        return float(self.scores(s, rows[np.argpartition(-like, k - 1)[:k]]).min()) if len(rows) >= k else 0.0

    def scores(self, s: int, rows: np.ndarray) -> np.ndarray:
        """Of some rows of a shard, (n,) float32: each summed in the order of the hashes."""
        from retrikt_ray.index.words.kernels import score

        shard, there = self.index.shards[s], self.there[s]
        places, weights = self.places[s, there].astype(np.int32), self.weights[there]
        few = np.bitwise_or.reduce(np.uint64(1) << (places & 63).astype(np.uint64), initial=np.uint64(0))
        return np.asarray(score(rows, shard.firsts, shard.held, shard.times, shard.lengths, places, few, weights, self.mean))


def kth(scores: np.ndarray, k: int) -> float:
    """The k-th best; 0 where there are fewer."""
    return 0.0 if len(scores) < k else float(np.partition(scores, len(scores) - k)[len(scores) - k])
