"""CPU time, memory and recall of the search for duplicates and leakage in a made-up store: `make bench-duplicates`, or with sizes.

Every tenth text is a near copy of an earlier one (a word left out, of 12 to 40). `templates`: all texts fill one sentence of eleven words, which is
the worst case, since all fall into the same buckets. Then, over made-up hashes, what the two tasks that see all rows of a store hold: the one of a
band, and the one that groups rows by their buckets. Each runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

WORDS, HELD = 30_000, 2_000
ROWS, PART = 4_000_000, 200_000  # of made-up hashes, and of them at a time


def texts_of(kind: str, count: int) -> tuple[list[str], int]:
    """Made-up texts, and how many of them are near copies."""
    rng = np.random.default_rng(0)
    if kind == "templates":
        return [f"what is the name of the {a} that lives near {b}" for a, b in rng.integers(0, WORDS, (count, 2))], 0
    shares = 1 / np.arange(1, WORDS + 1)
    shares /= shares.sum()
    texts: list[str] = []
    for i in range(count):
        if i % 10 == 9:
            text = texts[int(rng.integers(i))].split()
            del text[int(rng.integers(len(text)))]
        else:
            text = [f"w{w}" for w in rng.choice(WORDS, int(rng.integers(12, 40)), p=shares)]
        texts.append(" ".join(text))
    return texts, count // 10


def measured(kind: str, count: int) -> None:
    from retrikt_ray.store.duplicates import HeldOut, near_duplicates, shingles

    texts, copies = texts_of(kind, count + HELD)
    held, texts = texts[:HELD], texts[HELD:]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    held_out = HeldOut([(text, None) for text in held])
    leaked = sum(held_out.copied((text, None)) for text in texts)
    middle = time.process_time()
    twins = near_duplicates([shingles((text, None)) for text in texts], np.zeros(len(texts), bool), 0.8)
    seconds, memory = time.process_time() - middle, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{kind:9} {count:>9,} rows: leakage {middle - began:6.1f} s ({leaked:,} found), near duplicates {seconds:6.1f} s "
        f"({(twins >= 0).sum():,} found, about {copies:,} planted), {memory:,.0f} MB",
        flush=True,
    )


def held(task: str) -> None:
    """Memory of one task over ROWS rows."""
    from scipy.sparse import csgraph  # noqa: F401  before the measure: its import takes memory, too

    from retrikt_ray.store.decide import KEPT, Judged, grouped, linked
    from retrikt_ray.store.duplicates import BANDS

    rng = np.random.default_rng(0)

    class Parts:
        def __iter__(self) -> Iterator[Judged]:
            for _ in range(ROWS // PART):
                bands, keys = rng.integers(0, 3 * ROWS, (PART, BANDS), np.uint64), np.zeros((PART, 2), np.uint64)
                yield Judged(
                    np.full(PART, KEPT, np.uint8), np.zeros(PART, bool), keys, np.ones(PART, np.int64), np.zeros(0, np.uint32), bands
                )

    reasons = [np.full(ROWS, KEPT, np.uint8)]
    links = [tuple(rng.integers(0, ROWS, (2, ROWS // 16))) for _ in range(4)]
    for _ in Parts():
        pass
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if task == "linked":
        linked(Parts(), reasons, 0)
    else:
        grouped((links[band % 4] for band in range(BANDS)), ROWS, 8)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"{task:9} {ROWS:>9,} rows: {time.process_time() - began:.1f} s, {grown / ROWS:.0f} bytes a row", flush=True)


def apart(function: Callable[..., None], *call: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=call)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [10_000, 100_000]
    for kind in ("zipf", "templates"):
        for size in sizes:
            apart(measured, kind, size)
    for task in ("linked", "grouped"):
        apart(held, task)


if __name__ == "__main__":
    main()
