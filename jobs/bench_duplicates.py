"""CPU time, memory and recall of the search for duplicates and leakage in a made-up store: `make bench-duplicates`, or with sizes.

Every tenth text is a near copy of an earlier one (a word left out, of 12 to 40). `templates`: all texts fill one sentence of eleven words, which is
the worst case, since all fall into the same buckets. Each size runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time

import numpy as np

WORDS, HELD = 30_000, 2_000


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


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [10_000, 100_000]
    for kind in ("zipf", "templates"):
        for size in sizes:
            process = multiprocessing.get_context("spawn").Process(target=measured, args=(kind, size))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
