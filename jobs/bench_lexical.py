"""Benchmark of the lexical search and of edits at 2M rows: `python -m jobs.bench_lexical search | edits`. The figures of docs/benchmarks.md come from here.

search: rows of 6 to 18 made-up words, the n-th word drawn with a chance of 1 / n^s as in language, and questions of ten such words, most of them
frequent. Each is asked of the index and of a plain scorer of all postings of all its words, which the index was before; positions and scores must be equal
to the last bit. edits: ten rows added to 100,000 rows and to 2M.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from retrikt_ray.index.build import WORDS_ROWS
from retrikt_ray.index.search import merge
from retrikt_ray.index.words.lexical import Lexical
from retrikt_ray.index.words.postings import K1, B, Postings, counted
from retrikt_ray.task.texts import Text

ROWS = int(os.environ.get("RETRIKT_BENCH_ROWS", 2_000_000))
PART, VOCABULARY, ASKED, QUESTIONS, EDITS = 100_000, 50_000, 10, 40, 9
BAR = 10  # times as fast as the plain scorer


@dataclass
class Plain:
    """Postings by row, scored one word after the other over all rows of a shard."""

    low: int
    words: np.ndarray  # sorted hashes
    starts: np.ndarray
    rows: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def of(words: np.ndarray, counts: np.ndarray, distinct: np.ndarray, low: int) -> Plain:
        row = np.repeat(np.arange(len(distinct), dtype=np.int32), distinct)
        order = np.argsort(words, kind="stable")
        names, first = np.unique(words[order], return_index=True)
        lengths = np.bincount(row, counts, len(distinct)).astype(np.float32)
        return Plain(low, names, np.append(first, len(words)), row[order], counts[order].astype(np.float32), lengths)

    def find(self, word: int) -> slice:
        at = int(np.searchsorted(self.words, word))
        found = at < len(self.words) and self.words[at] == word
        return slice(int(self.starts[at]), int(self.starts[at + 1])) if found else slice(0, 0)


def added(weight: np.float32, counts: np.ndarray, lengths: np.ndarray, mean: float) -> np.ndarray:
    """What a word adds to scores, float32."""
    return np.asarray(weight * counts / (counts + np.float32(K1) * (1 - B + B * lengths / np.float32(mean))))


def plainly(shards: list[Plain], texts: list[Text], k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `Lexical.search`."""
    queries, rows = counted(texts), sum(len(s.lengths) for s in shards)
    mean = sum(float(s.lengths.sum(dtype=np.float64)) for s in shards) / rows
    answers = []
    for low, high in pairwise(queries.indptr):
        terms = list(zip(queries.indices[low:high].tolist(), queries.data[low:high].tolist(), strict=True))
        places = [[s.find(word) for s in shards] for word, _ in terms]
        holders = [sum(p.stop - p.start for p in place) for place in places]
        found = []
        for j, shard in enumerate(shards):
            scores = np.zeros(len(shard.lengths), np.float32)
            for (_, times), place, n in zip(terms, places, holders, strict=True):
                held = shard.rows[place[j]]
                weight = np.float32(times * np.log(1 + (rows - n + 0.5) / (n + 0.5)))
                scores[held] += added(weight, shard.counts[place[j]], shard.lengths[held], mean)
            some = np.flatnonzero(scores)
            if len(some) > k:
                some = some[scores[some] >= np.partition(scores[some], len(some) - k)[len(some) - k]]
            found.append(((some + shard.low).astype(np.int64)[None], scores[some][None]))
        answers.append(merge([f[0] for f in found], [f[1] for f in found], k))
    return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])


def drawn(rng: np.random.Generator, count: int, power: float) -> np.ndarray:
    """Numbers of words."""
    chances = np.cumsum(1 / np.arange(1, VOCABULARY + 1) ** power)
    return np.minimum(np.searchsorted(chances, rng.random(count) * chances[-1]), VOCABULARY - 1)


def made(power: float) -> tuple[Lexical, list[Plain]]:
    rng = np.random.default_rng(0)
    hashes = counted([(f"w{i}", None) for i in range(VOCABULARY)]).indices
    parts = []
    for start in range(0, ROWS, PART):
        lengths = rng.integers(6, 19, min(PART, ROWS - start))
        key = np.repeat(np.arange(len(lengths)), lengths) * 2**31 + hashes[drawn(rng, int(lengths.sum()), power)]
        key, counts = np.unique(key, return_counts=True)
        parts.append(((key % 2**31).astype(np.int32), counts.astype(np.uint8), np.bincount(key // 2**31, minlength=len(lengths))))
    plain = [Plain.of(*part, low=i * PART) for i, part in enumerate(parts)]
    each = WORDS_ROWS // PART
    shards = [
        Postings.sorted(*map(np.concatenate, zip(*parts[i : i + each], strict=True)), low=i * PART) for i in range(0, len(parts), each)
    ]
    return Lexical(shards), plain


def medians(ask: Callable[[list[Text]], Any], texts: list[Text]) -> tuple[float, list[Any]]:
    """Milliseconds of a question, and the answers. One round goes ahead untimed."""
    seconds, answers = [], []
    for text in texts:
        ask([text])
    for text in texts:
        began = time.perf_counter()
        answers.append(ask([text]))
        seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.median(seconds)), answers


def search() -> None:
    slow = []
    for power in (1.0, 1.2):
        index, plain = made(power)
        words = drawn(np.random.default_rng(9), ASKED * QUESTIONS, power).reshape(QUESTIONS, ASKED)
        texts: list[Text] = [(" ".join(f"w{w}" for w in row), None) for row in words]
        postings = int(np.median([sum(p.stop - p.start for s in plain for p in map(s.find, counted([t]).indices.tolist())) for t in texts]))
        for k in (8, 64):
            before, want = medians(lambda t, k=k, plain=plain: plainly(plain, t, k), texts)
            after, got = medians(lambda t, k=k, index=index: index.search(t, k), texts)
            same = all(np.array_equal(a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True))
            print(
                f"{ROWS:,} rows, word n with 1 / n^{power}, {postings:,} postings a question, k {k}: plain {before:.1f} ms, "
                f"index {after:.2f} ms, {before / after:.1f} times; equal: {same}",
                flush=True,
            )
            if not same:
                sys.exit("the answers differ")
            slow.append(before / after < BAR)
    if any(slow):
        sys.exit(f"the bar is {BAR} times")


def timed(writer: Any, reader: Any, texts: list[str]) -> dict[str, list[float]]:
    """Seconds of each step of some edits, of ten rows each."""
    seconds: dict[str, list[float]] = {"add": [], "take over": [], "delete": [], "find an id": []}
    for i in range(EDITS):
        rows = [{"id": f"added-{i}-{j}", "text": texts[10 * i + j], "label": ("negative", "positive")[j % 2]} for j in range(10)]
        marks = [time.perf_counter()]
        writer.knowledge.add(rows)
        marks.append(time.perf_counter())
        reader.knowledge.refresh(at_once=True)
        assert reader.knowledge.view.told_of([(rows[0]["text"], None)])[0] >= 0
        marks.append(time.perf_counter())
        writer.knowledge.delete([f"row-{i * 7:07d}"])
        marks.append(time.perf_counter())
        assert writer.knowledge.view.find([f"row-{i * 7 + 1:07d}"])
        marks.append(time.perf_counter())
        for step, (began, ended) in zip(seconds.values(), pairwise(marks), strict=True):
            step.append(ended - began)
    return seconds


def edits() -> None:
    import shutil

    from jobs import bench_edit
    from retrikt_ray.predictor import Predictor
    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.cluster import Workers
    from retrikt_ray.runtime.folders import Folder

    cluster.quiet(None)
    words, root = bench_edit.vocabulary(), bench_edit.ROOT / "lexical"
    shutil.rmtree(root, ignore_errors=True)
    cluster.connect((root / "ray.log").absolute())
    for rows in (100_000, ROWS):
        bench_edit.ROWS = rows
        run = Folder.at(root / f"run-{rows}")
        bench_edit.make_base(run, words)
        bench_edit.make_store(run, words)
        built = bench_edit.index(run, Workers(2, 1, 0))
        writer, reader = Predictor.open(run), Predictor.open(run)
        texts = bench_edit.texts(np.random.default_rng(2), words, 1000)
        seconds = timed(writer, reader, texts)
        shown = ", ".join(f"{name} {1e3 * float(np.median(s[1:])):.1f} ms (first {1e3 * s[0]:.0f})" for name, s in seconds.items())
        print(f"{rows:,} rows (index built in {built:.0f} s), ten rows an edit: {shown}", flush=True)
        shutil.rmtree(Path(run.uri))


if __name__ == "__main__":
    {"search": search, "edits": edits}[sys.argv[1]]()
