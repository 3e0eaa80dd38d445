"""The lexical side: BM25 over the same rows, in shards that answer as one index.

A score needs three figures of the whole store: rows, rows that hold the word, and the mean length. They are sums over shards, so N shards
score as one. BM25 as in Lucene (Kamphuis et al., ECIR 2020, "Which BM25 do you mean?", table 1): a word of the query adds
ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 (1 - b + b length / mean length)). Checked against the library bm25s in the tests.

A search is exact, and reads few postings. The k-th best of the rows in some short lists is a score that is certain. Then the lists are added up that
make the bound of what is left fall most for a posting, until little is left but of common words. A row may be among the k best if it was seen so
and its sum with the bounds of what is left reaches that score, or if the common words that it holds do alone; bitmaps tell which it holds.
The few rows that remain are scored by their own words (as in MaxScore, Turtle & Flood 1995, over postings ordered by impact, Anh & Moffat 2006).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa

from retrikt_ray.index.search import merge
from retrikt_ray.index.words.postings import Postings, added, counted
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.task.texts import Text

FIRST = 4096  # postings that are read before there is a k-th best score to prune by
RARE = 0.25  # of that score: what is left unread of words without bitmaps may add no more
FEW = 256  # rows that are held against many words at once
AT_ONCE = 16  # words whose bounds are taken in one array: it holds so many numbers a row
CERTAIN = 64  # rows at least that this score is taken from

SCRATCH = threading.local()


def summed(rows: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """For each of some rows below `count`, the sum of the values (float32) of all places that name it."""
    sums = getattr(SCRATCH, "sums", np.zeros(0, np.float32))  # all 0 but while this runs: it costs what the rows do, not what `count` does
    if len(sums) < count:
        sums = SCRATCH.sums = np.zeros(count, np.float32)
    try:
        np.add.at(sums, rows, values)
        return np.asarray(sums[rows])
    finally:
        sums[rows] = 0


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
        self.lost = np.sort(np.concatenate([np.zeros(0, np.int32), *(s.words[s.held[s.words_of(rows)[0]]] for s, rows in gone)]))

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
        return Lexical([*self.shards, more], np.unique(gone))

    def search(self, texts: list[Text], k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions (Q, k) and BM25 scores (Q, k), best first, ties by position; -1 and -inf where no further row shares a word.

        allowed: (rows,) bool, the rows that may be found; None: all that are not deleted.
        """
        queries = counted(texts)
        answers = []
        for low, high in pairwise(queries.indptr):
            found, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
            if low < high and self.shards:
                found, scores = Asked(self, queries.indices[low:high], queries.data[low:high]).best(k, allowed)
            answers.append(merge([found[None]], [scores[None]], k))
        return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])


class Asked:
    """A query of T words, and where their postings are in the S shards of an index: at most D lists a word."""

    def __init__(self, index: Lexical, words: np.ndarray, times: np.ndarray) -> None:
        """words: (T,) sorted hashes; times: (T,) in the query."""
        self.index = index
        found = [s.find(words) for s in index.shards]
        self.places = [at for at, _ in found]
        begin, end = (np.stack([s.lists[at + more * there] for s, (at, there) in zip(index.shards, found, strict=True)]) for more in (0, 1))
        self.depth = max(1, int((end - begin).max(initial=0)))
        lists = np.minimum(begin[..., None] + np.arange(self.depth + 1), end[..., None])  # (S, T, D + 1)
        self.ends = np.stack([s.starts[w] for s, w in zip(index.shards, lists, strict=True)])  # where the first d lists end
        held = self.ends[..., -1] - self.ends[..., 0]
        lost = np.searchsorted(index.lost, words, "right") - np.searchsorted(index.lost, words)
        n = held.sum(0) - lost
        self.weights = (times * np.log(1 + (index.live - n + 0.5) / (n + 0.5))).astype(np.float32)
        self.there = held > 0  # (S, T)
        self.slack = (len(words) + 8) * 2.0**-23  # of a score: how far apart two sums of it in float32 may be
        bounds, most = np.zeros((2, *end.shape, self.depth + 1))  # the most that a list adds to a score, and its largest count
        for bound, count, shard, which, there in zip(bounds, most, index.shards, lists, lists < end[..., None], strict=True):
            count[there] = shard.most[which[there]]
            bound[there] = added(self.weights[np.nonzero(there)[0]], count[there], shard.least[which[there]], index.mean)
        # Of all lists from the d-th on, of any shard, (T, D + 1).
        self.bounds, self.most = (np.maximum.accumulate(a.max(0)[:, ::-1], 1)[:, ::-1] for a in (bounds, most.astype(np.float32)))
        self.lines = [s.lines(at) for s, at in zip(index.shards, self.places, strict=True)]  # (S, T) of common words, -1 for others
        self.rare: np.ndarray = np.all(np.stack(self.lines) < 0, axis=0)
        self.steps = self.plan()
        self.cut = False  # whether `candidates` has left out rows beyond so many a word

    def plan(self) -> list[tuple[float, int, int, float, int]]:
        """What to read, step by step: (- what the bound falls for a posting, word, its lists that are read then, the fall, postings).

        A step is the next lists of one word, those for which the bound falls most for a posting.
        """
        steps = []
        sizes = (self.ends - self.ends[..., :1]).sum(0).tolist()
        for word, (size, bound) in enumerate(zip(sizes, self.bounds.tolist(), strict=True)):
            at = 0
            while bound[at] > 0:
                ahead = [j for j in range(at + 1, len(bound)) if size[j] > size[at]]
                price, to = max(((bound[at] - bound[j]) / (size[j] - size[at]), j) for j in ahead)
                steps.append((-price, word, to, bound[at] - bound[to], size[to] - size[at]))
                at = to
        return sorted(steps)

    def lists(self, step: int) -> np.ndarray:
        """How many lists of each word (T,) are read after so many steps."""
        found = np.zeros(len(self.weights), np.int64)
        for _, word, to, _, _ in self.steps[:step]:
            found[word] = to
        return found

    def best(self, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores of the k best rows and all that tie with the k-th, and of some others.

        1. A score that k rows of the largest shard are certain to reach.  2. All rows that may reach it, or what is certain by then.  3. Their scores.
        """
        words, falls = np.array([s[1] for s in self.steps], np.intp), np.array([s[3] for s in self.steps])
        read = np.append(0, np.cumsum([s[4] for s in self.steps]))
        rest, rare = (
            np.append(np.cumsum(f[::-1])[::-1], 0) for f in (falls, falls * self.rare[words])
        )  # what is left adds at most, after each step
        shards = np.argsort([-len(s.lengths) for s in self.index.shards], kind="stable").tolist()
        # 1. certain
        least, budget, last = 0.0, FIRST * len(shards), len(read) - 1
        step = -1
        while not least and step < last:
            step, budget = min(last, int(np.searchsorted(read, budget))), budget * 8
            least = self.reached(k, self.candidates(shards[0], step, 0.0, 0, allowed))
        # 2. possible
        found: list[tuple[np.ndarray, np.ndarray]] = []
        if least and rest[step] >= least:
            step = max(step, int((rare >= RARE * least).sum()))
            first = self.candidates(shards[0], step, least, FIRST, allowed)
            least = max(least, self.reached(k, first))
            found = [] if self.cut else [first]
        for s in shards[len(found) :]:
            found.append(self.candidates(s, step, least, self.index.rows, allowed))
            if s in (shards[0], shards[-1]):
                least = max(least, self.reached(k, *found))
        # 3. scored
        positions = np.sort(np.concatenate([row[upper >= least] for row, upper in found]))
        return positions, self.scores(positions)

    def reached(self, k: int, *found: tuple[np.ndarray, np.ndarray]) -> float:
        """What the k best of some rows score at least, as far as a few of them tell; 0 where there are fewer. found: as of `candidates`."""
        positions, upper = (np.concatenate(parts) for parts in zip(*found, strict=True))
        few = CERTAIN + 2 * k
        if len(upper) > few:
            positions = positions[np.argpartition(-upper, few)[:few]]
        scores = self.scores(np.sort(positions))
        return 0.0 if len(scores) < k else (1 - self.slack) * float(np.partition(scores, len(scores) - k)[len(scores) - k])

    def candidates(self, s: int, step: int, least: float, most: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Sorted positions of the rows of a shard that may score `least`, and the most that each may: those in the lists of a step, and of
        those that hold unread words only, `most` a word. least 0: the rows in the lists alone."""
        shard, lists = self.index.shards[s], self.lists(step)
        left = self.bounds[np.arange(len(lists)), lists]
        common = np.flatnonzero(~self.rare & (left > 0))
        common = common[np.argsort(-left[common])] if least else common[:0]
        found, rest, self.cut = [self.seen(s, lists, common, least)], left.sum(), False
        for i, word in enumerate(common.tolist()):
            if rest < least:
                break
            rest -= left[word]
            begin, end = self.ends[
                s, word, [lists[word], max(lists[word], min(self.depth, np.count_nonzero(self.bounds[word] + rest >= least)))]
            ]
            self.cut |= bool(end - begin > most)
            found.append(self.unseen(s, shard.rows[begin : min(end, begin + most)], lists, common[i:], least))
        row, upper = (np.concatenate(parts) for parts in zip(*found, strict=True))
        for mask in (self.index.alive, allowed):
            if mask is not None:
                kept = np.flatnonzero(mask[shard.low : shard.low + len(shard.lengths)][row])
                row, upper = row[kept], upper[kept]
        order = np.argsort(row)
        row, upper = row[order], upper[order]
        new = np.append(True, row[1:] > row[:-1])[: len(row)]
        first, again = np.flatnonzero(new), np.flatnonzero(~new)
        most_of = upper[first]
        np.maximum.at(most_of, np.searchsorted(first, again) - 1, upper[again])
        return row[first] + np.int64(shard.low), most_of

    def seen(self, s: int, lists: np.ndarray, common: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
        """The rows in so many lists (T,) of a shard that may score `least`, some of them more than once, and the most that each may."""
        shard = self.index.shards[s]
        begin, end = self.ends[s, :, 0], self.ends[s, np.arange(len(lists)), lists]
        parts = [slice(a, b) for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
        rows = np.concatenate([shard.rows[p] for p in parts]).astype(np.intp)
        counts = np.concatenate([shard.counts[p] for p in parts]).astype(np.float32)
        norms = shard.norms(rows, self.index.mean)
        upper = summed(rows, np.repeat(self.weights, end - begin) * counts / (counts + norms), len(shard.lengths))
        upper += self.limit(np.flatnonzero(self.most[np.arange(len(lists)), lists]), lists, norms)
        return self.narrowed(s, rows, upper * np.float32(1 + self.slack), norms, lists, common, least)

    def unseen(self, s: int, rows: np.ndarray, lists: np.ndarray, common: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
        """Of some rows with the first of some common words, those that may score `least` with these and what is left of rare words."""
        left, rare = self.bounds[np.arange(len(lists)), lists], np.flatnonzero(self.rare)
        upper = np.full(len(rows), (left[common].sum() + left[rare].sum()) * (1 + self.slack), np.float32)
        rows, _ = self.narrowed(s, rows, upper, None, lists, common[1:], least)
        norms = self.index.shards[s].norms(rows, self.index.mean)
        upper = self.limit(np.append(common, rare), lists, norms)
        return self.narrowed(s, rows, upper * np.float32(1 + self.slack), norms, lists, common[1:], least)

    def limits(self, words: np.ndarray, lists: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """The most that what is left of words adds to rows of some norms, (words, rows)."""
        most = self.most[words, lists[words], None]
        return np.asarray(self.weights[words, None] * most / (most + norms))

    def limit(self, words: np.ndarray, lists: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """The sum of `limits` over the words, (rows,)."""
        parts = np.array_split(words, max(1, len(words) // AT_ONCE))
        return np.asarray(sum(self.limits(part, lists, norms).sum(0) for part in parts))

    def narrowed(
        self, s: int, rows: np.ndarray, upper: np.ndarray, norms: np.ndarray | None, lists: np.ndarray, common: np.ndarray, least: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows that may score `least` if what is left of common words counts only where a row holds them, and as often; and the most that they may.

        norms: of the rows; None: what a word adds is bounded by that of the best row of all.
        """
        shard, common = self.index.shards[s], common[self.lines[s][common] >= 0]
        while True:
            some = (upper >= least).nonzero()[0]
            if len(some) < len(rows):
                rows, upper, norms = rows[some], upper[some], None if norms is None else norms[some]
            if not len(common) or not len(rows):
                return rows, upper
            words, common = np.split(common, [1 if len(rows) > FEW else AT_ONCE])  # many rows: one word after the other
            held, twice = shard.holding(self.lines[s][words], rows)
            if norms is None:
                upper = upper - ((held ^ 1) * self.bounds[words, lists[words], None].astype(np.float32)).sum(0)
            else:
                bound = self.limits(words, lists, norms)
                once = np.minimum(self.weights[words, None] / (1 + norms), bound)
                upper = upper - (bound - held * np.where(twice, bound, once)).sum(0)

    def scores(self, positions: np.ndarray) -> np.ndarray:
        """Of sorted positions, (n,) float32: each summed in the order of the hashes."""
        out = []
        for i, rows in self.index.by_shard(positions):
            shard, there = self.index.shards[i], self.there[i]
            weights = np.zeros(len(shard.words), np.float32)
            weights[self.places[i][there]] = self.weights[there]
            at, row = shard.words_of(rows)
            weight = weights[shard.held[at]]
            asked = np.flatnonzero(weight)
            row, at = row[asked], at[asked]
            sums = np.zeros(len(rows), np.float32)
            np.add.at(sums, row, added(weight[asked], shard.times[at], shard.lengths[rows[row]], self.index.mean))
            out.append(sums)
        return np.concatenate(out) if out else np.zeros(0, np.float32)
