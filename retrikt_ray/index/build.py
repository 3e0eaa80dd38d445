"""Building the index: one quantizer trained on a sample, shards filled in parallel straight from a table's Parquet row groups.

Each task reads one row group at a time, turns it into vectors (by the student, or from a column), and adds them to its shard; its memory is
that of a row group, the shard it writes, and the trained part. The table is any folder of Parquet files, whatever its size. `index.json`
comes last. How well the index answers is measured while it is built: the exact neighbours of a few queries are found on the way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from retrikt_ray.index.factory import choose
from retrikt_ray.index.learning import learn
from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.search import Searcher, allowing, longest, merge, with_probes
from retrikt_ray.index.vectors import StudentVectors, Vectors
from retrikt_ray.index.words.postings import Postings
from retrikt_ray.runtime.cluster import Workers, each, widest
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError, Scaled
from retrikt_ray.runtime.tables import Source
from retrikt_ray.task.texts import TEXT_COLUMNS, texts_of

TRAIN_ROWS = 160_000  # that a quantizer is trained on: 39 for each of 4,096 centroids, FAISS's least; bounds the memory of training
SHARD_ROWS = 500_000
SHARD_BYTES = 256e6  # of a shard: what a building task holds in memory, and a reader maps
WORDS_ROWS = (
    1_000_000  # of a file of postings, which a task sorts in memory: 1.4 kB a row for texts of 60 words; a search opens each file anew
)
RECALL_AT = 10
RECALL_QUERIES = 200  # that recall is measured with at most
ENOUGH = 0.01  # how far below the best recall fewer probes may stay
PROBES = (8, 16, 32, 64, 128, 256)


class IndexConfig(Scaled):
    """The index over the store."""

    factory: str = Field("auto", description="FAISS factory string, or auto: the most exact kind that fits memory_gb and latency_ms.")
    memory_gb: float = Field(4.0, gt=0, description="What the vectors of the index may take at most (auto).")
    latency_ms: float = Field(10.0, gt=0, description="Time for one query on one thread that auto aims at.")
    shards: int = Field(
        0, ge=0, description="Shard files; each is built by one Ray task. 0: one per 500k rows or 256 MB, two from 100k rows on."
    )
    nprobe: int = Field(
        0,
        ge=0,
        description="Lists that an IVF search visits (candidates of an HNSW search). 0: the fewest within a point of the best measured recall.",
    )
    voices: list[Literal["student", "dense", "lexical", "ngrams"]] = Field(
        ["student", "dense", "lexical", "ngrams"],
        min_length=1,
        description="Who may speak in an answer, where it lowers the loss on rows that nothing was trained on. [student]: the student alone, the quickest.",
    )


def sampled(source: Source, vectors: Vectors, wanted: np.ndarray) -> np.ndarray:
    """Vectors of the rows at `wanted` positions, sorted (a Ray task)."""
    found = []
    for name, group, first, rows in source.groups:
        low, high = np.searchsorted(wanted, (first, first + rows))
        if low < high:
            with source.parquet(name) as file:
                table = file.read_row_group(group, columns=list(vectors.columns))
            found.append(vectors.of(table.take(pa.array(wanted[low:high] - first))))
    return np.concatenate(found) if found else np.zeros((0, vectors.width), np.float32)


def train(factory: str, width: int, samples: list[np.ndarray], threads: int) -> bytes:
    """An empty trained index for inner products, serialised (a Ray task). Raises ConfigError on a factory string that FAISS refuses."""
    import faiss

    faiss.omp_set_num_threads(threads)
    sample = np.concatenate([np.zeros((0, width), np.float32), *samples])
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(sample)
        # Deleted rows are passed over by a selector: an index that cannot do that is of no use here.
        probe = faiss.clone_index(index)
        probe.add(sample[:1])
        probe.search(sample[:1], 1, params=with_probes(probe, 1, allowing(np.ones(1, bool))))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
        raise ConfigError(f"index.factory: FAISS refuses {factory!r} for {len(sample)} rows of {width} dimensions: {reason}") from None
    return faiss.serialize_index(index).tobytes()


def fill(
    trained: bytes, source: Source, vectors: Vectors, low: int, high: int, folder: Folder, name: str, queries: np.ndarray
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Fill a copy of the trained index with the rows low .. high - 1 and write it as one file (a Ray task).

    Returns the shard's card, and the positions and similarities (Q, RECALL_AT) of the queries' exact neighbours in it.
    """
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.deserialize_index(np.frombuffer(trained, dtype=np.uint8))
    best = (np.full((len(queries), RECALL_AT), -1, np.int64), np.full((len(queries), RECALL_AT), -np.inf, np.float32))
    norm = 0.0
    for first, table in source.read(low, high, vectors.columns):
        part = np.ascontiguousarray(vectors.of(table), dtype=np.float32)
        index.add(part)
        norm = max(norm, longest(part))
        if len(queries):
            near = queries @ part.T
            numbers = np.argpartition(-near, min(RECALL_AT, len(part)) - 1, axis=1)[:, :RECALL_AT]
            best = merge([best[0], first + numbers], [best[1], np.take_along_axis(near, numbers, 1)], RECALL_AT)
    with folder.create(name) as path:
        faiss.write_index(index, str(path))
    card = {"file": name, "low": low, "high": high, "norm": norm, "sha256": folder.sha256(name), "bytes": folder.size(name)}
    return card, *best


def count_words(source: Source, low: int, high: int, folder: Folder, name: str) -> str:
    """Write the postings of the rows low .. high - 1 as one file, whose name is returned (a Ray task)."""
    Postings.of((texts_of(table) for _, table in source.read(low, high, TEXT_COLUMNS)), low).write(folder, name)
    return name


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact neighbours (Q, k) that are among those found (Q, k)."""
    hits = (found[:, :, None] == exact[:, None, :]) & (exact >= 0)[:, None, :]
    return float(hits.any(1).sum() / max(1, (exact >= 0).sum()))


def edges(rows: int, shards: int) -> list[tuple[int, int]]:
    """Positions low .. high of each shard, as equal as can be; empty ones where there are fewer rows than shards."""
    cuts = np.linspace(0, rows, shards + 1).astype(int).tolist()
    return list(pairwise(cuts))


def build(
    config: IndexConfig,
    source: Source,
    vectors: Vectors,
    out: Folder,
    *,
    queries: np.ndarray,
    words: bool,
    seed: int,
    workers: Workers | None,
) -> dict[str, Any]:
    """Write shard-NNNN.faiss, words-NNNN.arrow where `words`, and index.json, which is returned. workers None: in this process.

    queries: (Q, width) vectors that recall is measured with, at most a few hundred; none needed for Flat.
    1. Choose.  2. Train on a sample.  3. Fill the shards.  4. Count the words.  5. Measure recall, choose the probes.
    """
    # 1. choose
    rows, factory, nprobe = source.rows, config.factory, config.nprobe
    why = f"{factory}: as the config says"
    if factory == "auto":
        factory, why = choose(rows, vectors.width, config.memory_gb, config.latency_ms)
    count = config.shards or (
        1 if rows < SHARD_ROWS // 5 else max(2, -(-rows // SHARD_ROWS), int(-(-rows * vectors.width // (SHARD_BYTES / 4))))
    )
    exact = factory == "Flat"

    # 2. train
    few = min(rows, 1 if exact else TRAIN_ROWS)
    wanted = np.array(sorted(random.Random(f"{seed}:sample").sample(range(rows), few)), np.int64)  # costs what is drawn
    parts = np.array_split(wanted, workers.count if workers else 1)
    samples = each(sampled, [(source, vectors, part) for part in parts], workers, "index: sample", by_reference=True)
    threads = widest(workers)
    trained = each(train, [(factory, vectors.width, samples, threads)], workers, "index: train", cpus=threads, by_reference=True)[0]

    # 3. fill
    queries = queries[:0] if exact else queries
    ranges = edges(rows, count)
    calls = [(trained, source, vectors, low, high, out, f"shard-{i:04d}.faiss", queries) for i, (low, high) in enumerate(ranges)]
    filled = each(fill, calls, workers, "index: shards")
    cards = [card for card, _, _ in filled]

    # 4. words
    named = [(source, low, high, out, f"words-{i:04d}.arrow") for i, (low, high) in enumerate(edges(rows, -(-rows // WORDS_ROWS)))]
    files = {"shards": cards, "words": each(count_words, named, workers, "index: words") if words else []}

    # 5. recall
    card = {"factory": factory, "why": why, "width": vectors.width, "rows": rows, "metric": "cosine", "nprobe": nprobe or PROBES[0]}
    measured = None
    if len(queries):
        truth, _ = merge([f[1] for f in filled], [f[2] for f in filled], RECALL_AT)
        out.write_json("index.json", card | files)
        tries = (nprobe,) if nprobe else PROBES
        values = each(measure, [(out, queries, tries, truth)], workers, "index: recall")[0]
        card["nprobe"], value = next((n, v) for n, v in zip(tries, values, strict=True) if v >= max(values) - ENOUGH)
        measured = {"at": RECALL_AT, "value": round(value, 4), "queries": len(queries)}
    card["recall"] = measured
    out.write_json("index.json", card | files)
    return card | files


def measure(folder: Folder, queries: np.ndarray, tries: tuple[int, ...], truth: np.ndarray) -> list[float]:
    """Recall of the built shards for each number of probes (a Ray task). The folder is not sealed yet: its files are ours of a moment ago."""
    searcher = Searcher.unsealed(folder, join=False)
    return [recall(replace(searcher, nprobe=n).search(queries, RECALL_AT)[0], truth) for n in tries]


def build_index(
    config: IndexConfig,
    store: Folder,
    student: Folder,
    out: Folder,
    queries: np.ndarray,
    *,
    seed: int,
    workers: Workers | None,
    memory: Memory | None = None,
    sources: Sequence[str] = (),
) -> dict[str, Any]:
    """Dense and lexical shards and the n-gram memory over a store, and index.json, which is returned.

    queries: (Q, width), to measure recall with. memory: the n-gram memory where there is one already, else it is learnt; sources: of the rows that it
    has learnt from, none: all.
    """
    (memory or learn(store, seed, workers)[0]).write(out)
    vectors = StudentVectors(student, queries.shape[1], workers.threads if workers else 1)
    card = build(config, Source.of(store), vectors, out, queries=queries[:RECALL_QUERIES], words=True, seed=seed, workers=workers)
    card["ngrams"] = {"sources": list(sources)}
    out.write_json("index.json", card)
    return card
