"""The loops of the word search over single postings, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrikt_ray.index.words.compiled import compiled
from retrikt_ray.index.words.postings import K1, B

SCALE, BASE, SLOPE = np.float32(K1), np.float32(1 - B), np.float32(B)


@compiled
def norm(length: Any, mean: Any) -> Any:
    """What BM25 adds to a count in the denominator for a row of so many words, float32."""
    return SCALE * (BASE + SLOPE * np.float32(length) / mean)


@compiled
def add(rows: Any, counts: Any, lengths: Any, alive: Any, weight: Any, mean: Any, sums: Any, seen: Any, n: int, new: bool) -> int:
    """Add what a word adds to the sums of the rows that hold it, but for those that are not alive.

    rows, counts: (P,) of the word. lengths: (N,) of all rows. alive: (N,) bool, or (0,) for all. weight, mean: float32.
    sums: (N,) float32, changed in place. seen: (N,) int32: rows whose sum was 0 are written there from n on; without `new` they are left out.
    Returns how many are there then.
    """
    for i in range(len(rows)):
        row = rows[i]
        if sums[row] == 0:
            if not new or (len(alive) and not alive[row]):
                continue
            seen[n] = row
            n += 1
        count = np.float32(counts[i])
        sums[row] += weight * count / (count + norm(lengths[row], mean))
    return n


@compiled
def keep(seen: Any, n: int, sums: Any, least: Any) -> int:
    """Keep those of the first n rows in `seen` whose sums (N,) are `least` or more, in their order, and how many they are. Sums of others become 0."""
    kept = 0
    for i in range(n):
        row = seen[i]
        if sums[row] >= least:
            seen[kept] = row
            kept += 1
        else:
            sums[row] = 0
    return kept


@compiled
def score(rows: Any, firsts: Any, held: Any, times: Any, lengths: Any, places: Any, few: Any, weights: Any, mean: Any) -> Any:
    """Scores (n,) float32 of some rows (n,): each summed over its words in the order of `held`.

    places: (T,) sorted, weights: (T,) of the question's words. few: uint64, which of 64 remainders their places have: most words of a row have others.
    """
    scores = np.zeros(len(rows), np.float32)
    for i in range(len(rows)):
        row = rows[i]
        below = norm(lengths[row], mean)
        for j in range(firsts[row], firsts[row + 1]):
            if not few >> np.uint64(held[j] & 63) & np.uint64(1):
                continue
            at = np.searchsorted(places, held[j])
            if at < len(places) and places[at] == held[j]:
                count = np.float32(times[j])
                scores[i] += weights[at] * count / (count + below)
    return scores
