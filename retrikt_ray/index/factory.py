"""Which FAISS index: chosen from rows, dimensions, a memory budget and a latency target.

The most exact kind that fits both is taken. Bytes per row are what FAISS stores; times are estimates from bytes touched at a modest memory
bandwidth, good to a factor of two or so: they choose a kind, they promise nothing. What the built index does is measured (recall, `build.py`)
and can be timed with `make bench-index-query`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from retrikt_ray.runtime.settings import ConfigError

BANDWIDTH = 1e10  # bytes a second that one thread scans
HOP_S = 2.5e-7  # one distance of a graph search: a cache miss and a vector
PROBES = 64  # lists that an IVF estimate visits
MIN_LISTED = 10_000  # below, lists are too short to be worth a quantizer


@dataclass(frozen=True)
class Kind:
    """One candidate: its factory string, bytes per row, and estimated seconds for one query on one thread."""

    factory: str
    title: str
    bytes_per_row: float
    seconds: float


def lists(rows: int) -> int:
    """The power of two nearest to 4 sqrt(rows): about as many centroids to compare as rows of a list, times a few."""
    return 2 ** round(math.log2(4 * math.sqrt(max(1, rows))))


def candidates(rows: int, width: int) -> list[Kind]:
    """All kinds that make sense for so many rows, the most exact first."""
    flat = 4.0 * width
    kinds = [Kind("Flat", "exact", flat, rows * flat / BANDWIDTH)]
    if rows < MIN_LISTED:
        return kinds
    count = lists(rows)
    coarse, visited = count * flat / BANDWIDTH, rows * min(1.0, PROBES / count)
    pieces = max(1, width // 4)  # sub-vectors of four dimensions, a byte each
    out = min(width, 4 * pieces)
    rotation = f"OPQ{pieces}" if out == width else f"OPQ{pieces}_{out}"
    tables = 256 * flat / BANDWIDTH  # of a query against all centroids of all pieces
    return [
        *kinds,
        Kind(f"IVF{count},Flat", "inverted lists of whole vectors", flat + 8, coarse + visited * flat / BANDWIDTH),
        Kind("HNSW32,Flat", "a graph over whole vectors", flat + 272, HOP_S * 64 * math.log2(rows)),
        Kind(f"IVF{count},SQ8", "inverted lists, one byte a dimension", width + 8.0, coarse + visited * width / BANDWIDTH),
        Kind(
            f"{rotation},IVF{count},PQ{pieces}",
            "inverted lists of product-quantised vectors",
            pieces + 8.0,
            coarse + tables + visited * 2e-8,
        ),
    ]


def human(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def choose(rows: int, width: int, memory_gb: float, latency_ms: float) -> tuple[str, str]:
    """(factory string, why, on one line). Raises ConfigError where even the smallest kind does not fit the memory."""
    kinds = candidates(rows, width)
    fits = [k for k in kinds if k.bytes_per_row * rows <= memory_gb * 1e9]
    if not fits:
        least = min(kinds, key=lambda k: k.bytes_per_row)
        raise ConfigError(
            f"index.memory_gb={memory_gb:g}: {rows:,} rows of {width} dimensions need at least {human(least.bytes_per_row * rows)} "
            f"({least.factory}); raise it, or make the student's vectors smaller"
        )
    quick = [k for k in fits if k.seconds * 1e3 <= latency_ms]
    best = quick[0] if quick else min(fits, key=lambda k: k.seconds)
    passed = [f"{k.factory} " + ("too large" if k not in fits else "too slow") for k in kinds[: kinds.index(best)]]
    why = f"{best.factory}: {best.title}, {human(best.bytes_per_row * rows)}, about {best.seconds * 1e3:.2g} ms a query"
    if not quick:
        why += f" (over the target of {latency_ms:g} ms, but nothing that fits {memory_gb:g} GB is quicker)"
    return best.factory, why + (f"; {', '.join(passed)}" if passed else "")
