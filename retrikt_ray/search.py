"""Searching the index: verified shards, merged answers.

A shard is a FAISS file over unit vectors (inner product = cosine similarity) whose ids are positions in the store. Searching N shards and
merging gives the ids and similarities of one index over all rows, ties by position, for Flat and IVF with one shared quantizer.
FAISS files are only opened after their SHA-256 was found to be the manifest's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from retrikt_ray import artifacts
from retrikt_ray.folders import ArtifactError, Folder


def merge(ids: list[np.ndarray], similarities: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several answers: each (Q, k_i), ids -1 where there is none. Returns (Q, k) ids and similarities, ties by id."""
    every = np.concatenate(ids, 1)
    scores = np.where(every < 0, -np.inf, np.concatenate(similarities, 1))
    order = np.lexsort((every, -scores), axis=1)[:, :k]
    found, best = np.take_along_axis(every, order, 1), np.take_along_axis(scores, order, 1)
    if found.shape[1] < k:
        pad = k - found.shape[1]
        found, best = np.pad(found, ((0, 0), (0, pad)), constant_values=-1), np.pad(best, ((0, 0), (0, pad)), constant_values=-np.inf)
    return found, best.astype(np.float32)


def search_shard(shard: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and ids of at least the k best rows, all that tie with the k-th among them.

    FAISS keeps any of several rows that tie for the last place; which one must not depend on how rows were cut into shards.
    """
    ask = k + 1
    while True:
        similarities, ids = shard.search(queries, max(1, min(ask, shard.ntotal)))
        tied = ids.shape[1] > k and ((similarities[:, -1] == similarities[:, k - 1]) & (ids[:, -1] >= 0)).any()
        if not tied or ask >= shard.ntotal:
            return similarities, ids
        ask *= 2


@dataclass
class Searcher:
    """All shards of an index, memory-mapped in this process."""

    shards: list[Any]
    width: int
    card: dict[str, Any]

    @staticmethod
    def open(folder: Folder, threads: int = 1) -> Searcher:
        """Verify and open. Raises ArtifactError that names the shard that is missing, cut, altered or not of this index."""
        artifacts.check(folder, deep=True)
        faiss.omp_set_num_threads(threads)
        card = folder.read_json("index.json")
        local = folder.local()
        shards = []
        for shard in card["shards"]:
            index = faiss.read_index(str(local / shard["file"]), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            if index.d != card["width"] or index.ntotal != shard["rows"]:
                raise ArtifactError(
                    f"{folder}/{shard['file']} holds {index.ntotal} vectors of {index.d} dimensions; index.json says {shard['rows']} of {card['width']}"
                )
            shards.append(index)
        return Searcher(shards, card["width"], card)

    @property
    def rows(self) -> int:
        return sum(s.ntotal for s in self.shards)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (Q, k), -1 where there are fewer rows, and cosine similarities (Q, k). queries: (Q, width) unit float32."""
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(f"queries have shape {queries.shape}; the index expects (Q, {self.width})")
        answers = [search_shard(s, np.ascontiguousarray(queries, dtype=np.float32), k) for s in self.shards]
        return merge([a[1] for a in answers], [a[0] for a in answers], k)
