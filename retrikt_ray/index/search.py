"""Searching the index: verified shards, merged answers.

A shard is a FAISS file over unit vectors (inner product = cosine similarity) of the rows low .. high - 1 of the store, in their order, so
that a row's position is `low` plus its number in the file. Searching N shards and merging gives the positions and similarities of one index
over all rows, ties by position, for Flat and for IVF with one shared quantizer. Three things would spoil that and are taken care of:
FAISS keeps any of several rows that tie for the last place; its Flat search rounds by how BLAS cuts the matrix into blocks; and the quantizer
must be asked once, not once a shard. FAISS files are only opened after their SHA-256 was found to be the manifest's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import faiss
import numpy as np

from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import ArtifactError, Folder

JOINED_BYTES = 1e9  # of an IVF index: up to here a process joins its shards in memory, for inverted lists in N pieces take longer to scan
EVERYWHERE = 2**31 - 1  # as many probes as there are lists
SLACK = 8  # rows asked for beyond k in a Flat shard, whose last digits are not to be trusted

# FAISS scans a Flat index row by row up to 128,000 queries x dimensions and keeps the best in a heap. A matrix product pays from three queries
# of 104 dimensions on, and a reservoir for any k: a batch of 64 over 10,000 rows takes a fifth of the time, over 100,000 a tenth.
faiss.cvar.distance_compute_blas_threshold = 512
faiss.cvar.distance_compute_min_k_reservoir = 1


class Search(Protocol):
    """What answers dense queries: this process, or others that hold shards."""

    missing: int  # holders of shards that the last search did without

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions (Q, k), -1 where there are fewer rows, and cosine similarities (Q, k), best first, ties by position.

        queries: (Q, width) unit float32. allowed: (rows,) bool, the rows that may be found; None: all.
        """
        ...


def checked(queries: np.ndarray, k: int, width: int) -> np.ndarray:
    """Queries as FAISS takes them, (Q, width) float32. Raises ValueError."""
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"queries have shape {queries.shape}; the index expects (Q, {width})")
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 or more")
    return np.ascontiguousarray(queries, dtype=np.float32)


def falling(similarities: np.ndarray) -> bool:
    """Whether each row (Q, k) falls from place to place, without ties."""
    return bool((similarities[:, 1:] < similarities[:, :-1]).all())


def merge(ids: list[np.ndarray], similarities: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several answers: each (Q, k_i), ids -1 where there is none. Returns (Q, k) ids and similarities, ties by id."""
    if len(ids) == 1 and ids[0].shape[1] >= k and falling(similarities[0]) and (ids[0][:, k - 1] >= 0).all():
        return ids[0][:, :k], similarities[0][:, :k].astype(np.float32, copy=False)  # as FAISS has it where nothing ties
    every = np.concatenate(ids, 1)
    scores = np.where(every < 0, -np.inf, np.concatenate(similarities, 1))
    order = np.lexsort((every, -scores), axis=1)[:, :k]
    found, best = np.take_along_axis(every, order, 1), np.take_along_axis(scores, order, 1)
    if found.shape[1] < k:
        pad = k - found.shape[1]
        found, best = np.pad(found, ((0, 0), (0, pad)), constant_values=-1), np.pad(best, ((0, 0), (0, pad)), constant_values=-np.inf)
    return found, best.astype(np.float32)


def allowing(rows: np.ndarray) -> Any:
    """FAISS's selector of the rows that are True, (n,) bool."""
    return faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))


def with_probes(index: Any, nprobe: int, selector: Any) -> Any:
    """FAISS search parameters for any index of the factory; None where the defaults do."""
    if isinstance(index, faiss.IndexPreTransform):
        inner = with_probes(faiss.downcast_index(index.index), nprobe, selector)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(nprobe, index.nlist), sel=selector)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(64, min(nprobe, index.ntotal)), sel=selector)
    return faiss.SearchParameters(sel=selector) if selector is not None else None


def complete(once: Any, rows: int, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The answers of once(queries, k, allowed, everywhere); queries whose lists held too few of the rows they may find are asked everywhere."""
    ids, similarities = once(queries, k, allowed, False)
    most = min(k, rows if allowed is None else int(np.count_nonzero(allowed)))
    if most and (ids[:, most - 1] < 0).any():
        short = np.flatnonzero(ids[:, most - 1] < 0)
        ids[short], similarities[short] = once(queries[short], k, allowed, True)
    return ids, similarities


class Lists:
    """The trained part that all shards of an IVF index share: rotation and coarse quantizer, asked once for all of them."""

    def __init__(self, index: Any, nprobe: int) -> None:
        self.chain = []
        if isinstance(index, faiss.IndexPreTransform):
            self.chain = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
            index = faiss.downcast_index(index.index)
        self.quantizer, self.nprobe = faiss.downcast_index(index.quantizer), min(nprobe, index.nlist)
        self.owner = index  # keeps the quantizer alive

    def __call__(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rotated queries (Q, d), and the similarities and numbers (Q, nprobe) of the lists to visit."""
        for transform in self.chain:
            queries = transform.apply(queries)
        return queries, *self.quantizer.search(queries, self.nprobe)


class Shard:
    """One FAISS index over the rows low .. low + ntotal - 1."""

    def __init__(self, index: Any, low: int, norm: float) -> None:
        self.index, self.low, self.norm = index, low, norm  # norm: length of the longest vector
        self.ivf = faiss.try_extract_index_ivf(index)
        self.vectors = None
        if isinstance(index, faiss.IndexFlat) and index.ntotal:
            self.vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)

    def takes(self, other: Shard) -> bool:
        """Whether `other` can be joined: the rows that follow, in plain lists (fast-scan ones do not survive it)."""
        plain = all(
            x.ivf is not None and isinstance(faiss.downcast_InvertedLists(x.ivf.invlists), faiss.ArrayInvertedLists) for x in (self, other)
        )
        return plain and self.low + int(self.index.ntotal) == other.low

    def join(self, other: Shard) -> None:
        """Take over the rows of `other`, whose trained part is the same."""
        self.index.merge_from(other.index, self.index.ntotal)

    def ask(self, queries: np.ndarray, k: int, nprobe: int, selector: Any, visit: Any) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's own k best: similarities and numbers in the file."""
        if isinstance(self.index, faiss.IndexHNSW) and nprobe == EVERYWHERE:  # not all rows can be reached in a graph
            storage = faiss.downcast_index(self.index.storage)
            return storage.search(queries, k, params=with_probes(storage, 1, selector))
        if self.ivf is None:
            return self.index.search(queries, k, params=with_probes(self.index, nprobe, selector))
        rotated, similarities, chosen = visit
        params = faiss.SearchParametersIVF(nprobe=chosen.shape[1], sel=selector)
        found, which = np.empty((len(rotated), k), np.float32), np.empty((len(rotated), k), np.int64)
        # The C++ function: its Python wrapper takes no parameters.
        arrays = [np.ascontiguousarray(a) for a in (rotated, chosen, similarities)]
        x, lists, near = (faiss.swig_ptr(a) for a in arrays)
        self.ivf.search_preassigned_c(len(rotated), x, k, lists, near, faiss.swig_ptr(found), faiss.swig_ptr(which), False, params)
        return found, which

    def search(self, queries: np.ndarray, k: int, nprobe: int, allowed: np.ndarray | None, visit: Any) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and positions of at least the k best rows, all that could tie with the k-th among them."""
        total, selector = self.index.ntotal, None
        if total == 0:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        if allowed is not None:
            own = allowed[self.low : self.low + total]
            if not own.all():
                selector = allowing(own)
        ask = min(total, k + (SLACK if self.vectors is not None else 1))
        similarities, numbers = self.ask(queries, ask, nprobe, selector, visit)
        if self.vectors is None and falling(similarities):
            return similarities, self.positions(numbers)
        # How far FAISS's inner products may be from ours: the usual bound for a sum of d products in float32.
        margin = np.zeros(len(queries))
        if self.vectors is not None:
            margin = 2 * self.index.d * 2.0**-23 * self.norm * np.linalg.norm(queries, axis=1)
        pending = np.arange(len(queries))
        while ask < total:  # where the last row could tie with the k-th, ask again for more
            tie = similarities[pending, -1] >= similarities[pending, k - 1] - margin[pending]
            pending = pending[tie & (numbers[pending, -1] >= 0)]
            if not len(pending):
                break
            grow, ask = ((0, 0), (0, min(ask, total - ask))), min(2 * ask, total)
            similarities, numbers = np.pad(similarities, grow, constant_values=-np.inf), np.pad(numbers, grow, constant_values=-1)
            part = visit and tuple(v[pending] for v in visit)
            similarities[pending], numbers[pending] = self.ask(queries[pending], ask, nprobe, selector, part)
        if self.vectors is not None:
            similarities = self.rescored(queries, numbers)
        return similarities, self.positions(numbers)

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Of rows numbered within the shard; -1 stays."""
        return np.where(numbers < 0, -1, numbers + self.low) if self.low else numbers

    def rescored(self, queries: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Similarities (Q, c) of found rows, each summed in one order, whatever the batch and the shard. -inf for -1."""
        assert self.vectors is not None
        out = np.full(numbers.shape, -np.inf, np.float32)
        step = max(1, 4_000_000 // max(1, numbers.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            rows = self.vectors[numbers[part]].astype(np.float64)
            out[part] = (rows * queries[part, None]).sum(-1)
        out[numbers < 0] = -np.inf
        return out


@dataclass
class Searcher:
    """Shards in this process, memory-mapped; those of a small IVF index joined in memory."""

    shards: list[Shard]
    width: int
    nprobe: int
    threads: int = 1
    missing: int = 0  # holders of shards that the last search did without: never any

    def __post_init__(self) -> None:
        ivf = bool(self.shards) and self.shards[0].ivf is not None
        self.lists = Lists(self.shards[0].index, self.nprobe) if ivf else None
        self.rows = sum(int(s.index.ntotal) for s in self.shards)

    @staticmethod
    def open(folder: Folder, threads: int = 1, only: list[str] | None = None) -> Searcher:
        """Verify and open, or only the shards named. Raises ArtifactError that names the file that is missing, cut, altered or not of this index."""
        artifacts.check(folder, deep=True, only=None if only is None else ["index.json", *only])
        return Searcher.unsealed(folder, threads, only)

    @staticmethod
    def unsealed(folder: Folder, threads: int = 1, only: list[str] | None = None, join: bool = True) -> Searcher:
        """Open shards that this process has just verified, or its own job has just written. join=False: mapped, whatever the kind."""
        card = folder.read_json("index.json")
        local = folder.local()
        cards = [s for s in card["shards"] if only is None or s["file"] in only]
        join = join and "IVF" in card["factory"] and sum(s["bytes"] for s in cards) <= JOINED_BYTES
        mapped = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY
        shards: list[Shard] = []
        for shard in cards:
            try:
                index = faiss.read_index(str(local / shard["file"]), 0 if join else mapped)
            except RuntimeError as error:
                raise ArtifactError(f"{folder}/{shard['file']} cannot be read by FAISS ({error})") from None
            if index.d != card["width"] or index.ntotal != shard["high"] - shard["low"]:
                raise ArtifactError(
                    f"{folder}/{shard['file']} holds {index.ntotal} vectors of {index.d} dimensions; "
                    f"index.json says {shard['high'] - shard['low']} of {card['width']}"
                )
            opened = Shard(index, shard["low"], shard["norm"])
            if join and shards and shards[-1].takes(opened):
                shards[-1].join(opened)
            else:
                shards.append(opened)
        return Searcher(shards, card["width"], card["nprobe"], threads)

    @staticmethod
    def over(vectors: np.ndarray, low: int, threads: int = 1) -> Searcher:
        """Exact search over vectors in memory, (n, width) float32, at the positions from `low` on."""
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return Searcher([Shard(index, low, longest(vectors))], vectors.shape[1], 1, threads)

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Search.search`. allowed covers all positions of the store."""
        return complete(self.once, self.rows, checked(queries, k, self.width), k, allowed)

    def once(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, everywhere: bool) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, but from the lists that are probed, or all of them."""
        faiss.omp_set_num_threads(self.threads)  # of the calling thread
        lists, nprobe = self.lists, self.nprobe
        if everywhere:
            lists, nprobe = lists and Lists(self.shards[0].index, EVERYWHERE), EVERYWHERE
        visit = lists and lists(queries)
        answers = [s.search(queries, k, nprobe, allowed, visit) for s in self.shards]
        if not answers:
            answers = [(np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64))]
        return merge([a[1] for a in answers], [a[0] for a in answers], k)


def longest(vectors: np.ndarray) -> float:
    """Length of the longest vector."""
    return float(np.sqrt(np.einsum("nd,nd->n", vectors, vectors).max())) if len(vectors) else 0.0
