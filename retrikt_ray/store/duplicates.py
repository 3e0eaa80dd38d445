"""Texts that say the same: equal ones, near duplicates in a whole store, and copies of held-out texts. Pure functions.

Near duplicates are found by MinHash and locality-sensitive hashing (Broder 1997; datasketch's MinHash) over words and pairs of neighbouring
words, and are then compared exactly. Chance decides at most whether a pair is looked at, and by one seed: what is rejected is a function of the
rows and their order.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any
from zlib import crc32

import numpy as np

from retrikt_ray.task.texts import Text
from retrikt_ray.task.words import words

PERMUTATIONS, BANDS = 128, 16  # of a MinHash: finds 95 % of the pairs that share 0.8 of their shingles, 99.4 % at 0.85, all at 0.9
MOST = 64  # rows of a bucket that a row is compared with, the earliest first, so that a store of one template takes no quadratic time
GRAM = 8  # words in a row that two texts share by copying, seldom by chance
COPIED = 0.5  # of a held-out text's GRAM-grams


def key(text: str, text_pair: str | None) -> tuple[int, int]:
    """Equal for texts that differ only in case, spacing and punctuation; a hash of 128 bits, so that a store's keys fit in memory."""
    plain = "\x1f".join(letters(part) or part for part in (text, text_pair or ""))
    both = hashlib.blake2b(plain.encode(), digest_size=16).digest()
    return int.from_bytes(both[:8], "little"), int.from_bytes(both[8:], "little")


def repeated(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which rows have the key of an earlier one that counts, (N,). keys (N, 2), counts (N,) bool."""
    order = np.lexsort(keys.T)
    fresh = np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(1))[: len(keys)]
    groups = np.empty(len(keys), np.int64)
    groups[order] = np.cumsum(fresh) - 1
    first = np.full(len(keys), len(keys))
    np.minimum.at(first, groups[counts], np.flatnonzero(counts))
    return np.asarray(np.arange(len(keys)) > first[groups])


class Ragged(Sequence[np.ndarray]):
    """Rows of different lengths in one array."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.flat, self.starts, self.ends = flat, starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: Any) -> Any:
        return self.flat[self.starts[row] : self.ends[row]]

    @staticmethod
    def joined(parts: Sequence[Ragged]) -> Ragged:
        """The rows of all, one after another, in an array of their own."""
        sizes = np.concatenate([np.zeros(0, np.int64), *(part.ends - part.starts for part in parts)])
        ends = np.cumsum(sizes)
        flat = [part.flat[spans(part.starts, part.ends)] for part in parts]
        return Ragged(np.concatenate([np.zeros(0, np.uint32), *flat]), ends - sizes, ends)


def spans(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers starts[0] .. ends[0] - 1, starts[1] .. and so on, one after another."""
    sizes = ends - starts
    return np.asarray(np.repeat(ends - np.cumsum(sizes), sizes) + np.arange(sizes.sum()))


def components(links: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """Of each of so many rows a number that it shares with those it hangs together with, (count,). links: rows, and by row one that it is linked to."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    labels = np.arange(count)
    for one, other in links:
        pairs = coo_array((np.ones(len(one), bool), (labels[one], labels[other])), shape=(count, count))
        labels = connected_components(pairs, directed=False)[1][labels]
    return labels


def letters(text: str) -> str:
    """Letters, numbers and combining marks (the vowel signs of many scripts) in lower case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(c)[0] in "LNM")


def plain_words(text: str) -> list[str]:
    """Words without their marks; a text without letters is one word."""
    return [w for word in words(text) if (w := letters(word))] or [text]


def hashed(parts: set[str], side: int) -> list[int]:
    """Hashes of 32 bits, the lowest bit being the side of the pair."""
    return [crc32(part.encode("utf-8", "surrogatepass")) & ~1 | side for part in parts]


def shingles(text: Text) -> np.ndarray:
    """Words and pairs of neighbouring words of both sides, sorted uint32 (n,)."""
    found: list[int] = []
    for side, part in enumerate(text):
        if part is not None:
            some = plain_words(part)
            found += hashed({*some, *map(" ".join, pairwise(some))}, side)
    return np.unique(np.array(found, np.uint32))


def jaccard(first: set[int], second: set[int]) -> float:
    """What two texts share of their shingles; of pairs, what the side shares that shares less."""
    common, either = first & second, first | second
    seconds = sum(shingle & 1 for shingle in either)  # of the second side
    if not seconds:
        return len(common) / len(either)
    shared = sum(shingle & 1 for shingle in common)
    return min((len(common) - shared) / (len(either) - seconds), shared / seconds)


def near_duplicates(rows: Sequence[np.ndarray], fixed: np.ndarray, threshold: float, keys: np.ndarray | None = None) -> np.ndarray:
    """Of each row the earlier one that it nearly equals, or -1, (N,). Rows that nearly equal an earlier one are nobody's duplicate.

    rows: shingles, in the order in which rows are kept; fixed (N,): rows that are kept whatever they equal; threshold: of `jaccard`;
    keys: `band_keys` of the rows, where they are known.
    """
    twin = np.full(len(rows), -1)
    first, following = buckets(band_keys(rows) if keys is None else keys)
    for row in np.flatnonzero((first != np.arange(len(rows))[:, None]).any(1) & ~fixed):
        mine, compared = set(rows[int(row)].tolist()), set()
        for band in np.flatnonzero(first[row] != row):
            other, looks = int(first[row, band]), 0
            while other != row and looks < MOST and twin[row] < 0:
                if twin[other] < 0:
                    looks += 1
                    if other not in compared and jaccard(mine, set(rows[other].tolist())) >= threshold:
                        twin[row] = other
                    compared.add(other)
                other = int(following[other, band])
            if twin[row] >= 0:
                break
    return twin


def buckets(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By row and band, the first row of its bucket, and the next one after it (-1: none), both (N, BANDS). keys: as of `band_keys`."""
    first, following = np.empty(keys.shape, np.int32), np.full(keys.shape, -1, np.int32)
    for band in range(BANDS):
        order = np.argsort(keys[:, band], kind="stable")
        same = keys[order[1:], band] == keys[order[:-1], band]
        begins = np.maximum.accumulate(np.where(np.append(False, same), 0, np.arange(len(order)))) if len(order) else order
        first[order, band] = order[begins]
        following[order[:-1][same], band] = order[1:][same]
    return first, following


def band_keys(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Hashes of the bands of each row's MinHash, uint64 (N, BANDS)."""
    from datasketch import MinHash

    sketch = MinHash(PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")
    factors = np.random.default_rng(1).integers(0, 2**63, PERMUTATIONS // BANDS, np.uint64) * 2 + 1
    keys = np.empty((len(rows), BANDS), np.uint64)
    for i, row in enumerate(rows):
        sketch.clear()
        sketch.update_batch(row.tolist())
        keys[i] = (sketch.hashvalues.reshape(BANDS, -1) * factors).sum(1)
    return keys


def grams(part: str) -> set[int]:
    """Hashes of the runs of GRAM words of one side; a shorter one is a run of its own."""
    some = plain_words(part)
    runs = {" ".join(some[i : i + GRAM]) for i in range(max(1, len(some) - GRAM + 1))}
    return {int.from_bytes(hashlib.blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") for run in runs}


def sides(text: Text) -> list[str]:
    return [part for part in text if part is not None]


class HeldOut:
    """Texts that no row of the store may copy."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.keys = {key(*text) for text in texts}
        found = [[grams(side) for side in sides(text)] for text in texts]
        self.parts = [PartGrams(parts) for parts in zip(*found, strict=True)]

    def equals(self, text: Text) -> bool:
        """Whether a text is one of them but for case, spacing and marks."""
        return key(*text) in self.keys

    def copied(self, text: Text) -> bool:
        """Whether a text holds COPIED of the runs of GRAM words of one of them; of a pair, on both sides."""
        found: np.ndarray | None = None
        for part, side in zip(self.parts, sides(text), strict=False):
            rows = part.copied(grams(side))
            found = rows if found is None else np.intersect1d(found, rows)
        return found is not None and len(found) > 0


class PartGrams:
    """The runs of words of one side of the held-out texts, sorted."""

    def __init__(self, texts: Sequence[set[int]]) -> None:
        self.sizes = np.array([len(text) for text in texts])
        flat = np.fromiter(chain.from_iterable(texts), np.uint64)
        order = np.argsort(flat, kind="stable")
        self.grams, self.text = flat[order], np.repeat(np.arange(len(texts), dtype=np.int32), self.sizes)[order]

    def copied(self, found: set[int]) -> np.ndarray:
        """Numbers of the texts of whose runs COPIED are among these, ascending."""
        wanted = np.fromiter(found, np.uint64)
        low, high = (np.searchsorted(self.grams, wanted, side) for side in ("left", "right"))
        hits = [self.text[a:b] for a, b in zip(low, high, strict=True) if a < b]
        if not hits:
            return np.zeros(0, np.int32)
        texts, counts = np.unique(np.concatenate(hits), return_counts=True)
        return np.asarray(texts[counts >= COPIED * self.sizes[texts]])
