"""Benchmarks of the index: `python -m jobs.bench_index build|memory|query`. The figures of docs/benchmarks.md come from here.

Vectors are unit, 128 dimensions, drawn around 2,000 centres (seed 0), in one Parquet file with row groups of 16,384 rows. Each way of building
runs in a process of its own, one after the other; both sides of a ratio are measured in the same call.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(os.environ.get("RETRIKT_BENCH", "runs/bench-index"))
MISSED: list[str] = []
DIM, GROUP = 128, 16_384
FACTORY = os.environ.get("RETRIKT_BENCH_FACTORY", "IVF4096,PQ16")
ROWS = int(os.environ.get("RETRIKT_BENCH_ROWS", 1_000_000))
AUTOFAISS_KEY = "OPQ16_128,IVF4096_HNSW32,PQ16x8"  # the kind nearest to FACTORY that autofaiss builds
AUTOFAISS = Path(".venv-autofaiss/bin/python")  # made by `make bench-index-build`


def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Unit vectors (rows, DIM) around the centres."""
    centres = np.random.default_rng(7).normal(size=(2000, DIM)).astype(np.float32)
    found = centres[rng.integers(0, 2000, rows)] + 0.7 * rng.standard_normal((rows, DIM), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def table(rows: int) -> Path:
    """A folder with the vectors as part-00000.parquet, made once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = ROOT / f"vectors-{rows}"
    if not (folder / "part-00000.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([("vector", pa.list_(pa.float32(), DIM))])
        with pq.ParquetWriter(folder / "aside.tmp-0", schema, compression="none") as writer:
            rng = np.random.default_rng(0)
            for start in range(0, rows, GROUP):
                part = draw(rng, min(GROUP, rows - start))
                writer.write_table(pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), DIM)}, schema=schema))
        (folder / "aside.tmp-0").rename(folder / "part-00000.parquet")
    return folder


def queries(count: int) -> np.ndarray:
    return draw(np.random.default_rng(1), count)


def plain(folder: Path, out: Path, threads: int) -> None:
    """What one process of plain FAISS does for the same file: read, train on as many rows, add, write."""
    import faiss
    import pyarrow.parquet as pq

    from retrikt_ray.index.build import TRAIN_ROWS

    began = time.perf_counter()
    faiss.omp_set_num_threads(threads)
    file = pq.ParquetFile(folder / "part-00000.parquet")
    rows = file.metadata.num_rows

    def group(i: int) -> np.ndarray:
        column = file.read_row_group(i)["vector"].combine_chunks()
        return np.asarray(column.flatten(), dtype=np.float32).reshape(-1, DIM)

    wanted = np.sort(np.random.default_rng(0).choice(rows, min(rows, TRAIN_ROWS), replace=False))
    sample = np.concatenate(
        [group(i)[wanted[(wanted >= i * GROUP) & (wanted < (i + 1) * GROUP)] - i * GROUP] for i in range(file.num_row_groups)]
    )
    index = faiss.index_factory(DIM, FACTORY, faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    trained = time.perf_counter()
    for i in range(file.num_row_groups):
        index.add(group(i))
    faiss.write_index(index, str(out))
    done = time.perf_counter()
    print(json.dumps({"seconds": done - began, "train": trained - began, "add": done - trained, "bytes": out.stat().st_size}))


def ours(folder: Path, out: Path, workers: int, watched: bool = False) -> None:
    """The build of the index stage, on a Ray cluster that is running already; `watched`: with the peak of its processes' memory."""
    import ray

    from retrikt_ray.index.build import IndexConfig, build
    from retrikt_ray.index.vectors import Column
    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.cluster import Workers
    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.runtime.tables import Source

    shutil.rmtree(out, ignore_errors=True)
    cluster.connect(Path(f"{out}.log").absolute())
    peak, stop = watch_memory() if watched else ({}, threading.Event())  # looking takes a tenth of a core
    began = time.perf_counter()
    card = build(
        IndexConfig(factory=FACTORY),
        Source.of(Folder.at(folder)),
        Column("vector", DIM),
        Folder.at(out),
        queries=queries(100),
        words=False,
        seed=0,
        workers=Workers(workers, 1, 0),
    )
    seconds = time.perf_counter() - began
    stop.set()
    ray.shutdown()
    size = sum(s["bytes"] for s in card["shards"])
    print(
        json.dumps(
            {
                "seconds": seconds,
                "bytes": size,
                "peak": peak,
                "shards": len(card["shards"]),
                "recall": card["recall"],
                "nprobe": card["nprobe"],
            }
        )
    )


def watch_memory() -> tuple[dict[str, float], threading.Event]:
    """Peak of the memory (PSS: shared pages are shared out) of this process and Ray's workers together, in MB; Ray's daemons left out."""
    import psutil

    me, peak, stop = psutil.Process(), {"all": 0.0, "before": 0.0}, threading.Event()

    def total() -> float:
        found = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                if process == me or (process.cmdline()[:1] and process.cmdline()[0].startswith("ray::")):
                    found += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found / 1e6

    def look() -> None:
        while not stop.wait(0.2):
            peak["all"] = max(peak["all"], total())

    peak["before"] = total()
    threading.Thread(target=look, daemon=True).start()
    return peak, stop


def autofaiss(folder: Path, out: Path) -> dict[str, Any]:
    """autofaiss on the same vectors and cores, in an environment of its own."""
    import pyarrow.parquet as pq

    arrays = ROOT / "npy"
    shutil.rmtree(arrays, ignore_errors=True)
    arrays.mkdir(parents=True)
    column = pq.read_table(folder / "part-00000.parquet")["vector"].combine_chunks()
    np.save(arrays / "vectors.npy", np.asarray(column.flatten(), dtype=np.float32).reshape(-1, DIM))
    code = (
        "import time, json, sys; from autofaiss import build_index; began = time.perf_counter();"
        f"build_index({str(arrays.absolute())!r}, index_path={str(out.absolute())!r}, index_infos_path={str(out.absolute()) + '.json'!r}, index_key={AUTOFAISS_KEY!r}, metric_type='ip',"
        "nb_cores=2, max_index_memory_usage='4G', current_memory_available='12G', verbose=40, min_nearest_neighbors_to_retrieve=10);"
        "print(json.dumps({'seconds': time.perf_counter() - began}))"
    )
    done = subprocess.run([str(AUTOFAISS.absolute()), "-c", code], capture_output=True, text=True, cwd="/")  # its imports shadow ours
    if done.returncode:
        sys.exit(f"autofaiss: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def alone(*arguments: Any, factory: str = FACTORY) -> dict[str, Any]:
    """Run one way of building in a process of its own: "plain", "ours", or "watched" (ours, with its memory). Its last line is JSON."""
    command, env = [sys.executable, "-m", "jobs.bench_index", *map(str, arguments)], os.environ | {"RETRIKT_BENCH_FACTORY": factory}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    print(arguments[0], arguments[-1], done.stdout.splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def bar(what: str, value: float, most: float) -> None:
    """Tell a figure and its bar; the command fails at its end if one was missed."""
    MISSED.extend([what] if value > most else [])
    print(f"{what}: {value:.3f}, bar {most:g}: {'missed' if value > most else 'held'}", flush=True)


def build_bench() -> None:
    folder = table(ROWS)
    two, one = alone("ours", folder, ROOT / "ours-2", 2), alone("ours", folder, ROOT / "ours-1", 1)
    faiss_two, faiss_one = alone("plain", folder, ROOT / "plain-2.faiss", 2), alone("plain", folder, ROOT / "plain-1.faiss", 1)
    rows = [
        ("plain faiss, one process, 2 threads", faiss_two, 2),
        ("ours, 2 workers of 1 thread", two, 2),
        ("plain faiss, one process, 1 thread", faiss_one, 1),
        ("ours, 1 worker of 1 thread", one, 1),
    ]
    if AUTOFAISS.exists():
        rows.append((f"ours, 2 workers, {AUTOFAISS_KEY}", alone("ours", folder, ROOT / "ours-key", 2, factory=AUTOFAISS_KEY), 2))
        rows.append((f"autofaiss, 2 cores, {AUTOFAISS_KEY} (it tunes, too)", autofaiss(folder, ROOT / "autofaiss.index"), 2))
    print(f"\n{FACTORY}, {ROWS:,} x {DIM}:\n\n| | seconds | vectors/s/core |\n|---|---|---|")
    for name, found, cores in rows:
        print(f"| {name} | {found['seconds']:.1f} | {ROWS / found['seconds'] / cores:,.0f} |")
    print(f"\nPlain, 2 threads: train {faiss_two['train']:.1f} s, add {faiss_two['add']:.1f} s.")
    bar("time against plain faiss, 2 cores", two["seconds"] / faiss_two["seconds"], 1.15)
    bar("time against plain faiss, 1 core", one["seconds"] / faiss_one["seconds"], 1.15)
    bar("time of 2 workers against 1", two["seconds"] / one["seconds"], 1 / 1.6)
    bar("microseconds a vector and core", two["seconds"] / ROWS * 2e6, 1e6 / 1600)
    print(f"Shards {two['shards']}, recall@10 {two['recall']['value']} with {two['nprobe']} probes.")


def memory_bench() -> None:
    print(f"\n{FACTORY}, 2 workers:\n\n| rows | peak memory, MB | before the build | seconds | index, MB |\n|---|---|---|---|---|")
    peaks = []
    for rows in (250_000, 500_000, 1_000_000, 2_000_000):
        found = alone("watched", table(rows), ROOT / f"memory-{rows}", 2)
        peaks.append(found["peak"]["all"])
        print(
            f"| {rows:,} | {found['peak']['all']:,.0f} | {found['peak']['before']:,.0f} | {found['seconds']:.0f} | {found['bytes'] / 1e6:,.0f} |",
            flush=True,
        )
    middle = (max(peaks) + min(peaks)) / 2
    print(f"\nMiddle {middle:,.0f} MB; 2M against 250k: {peaks[-1] / peaks[0]:.2f}.")
    bar("largest peak against the middle", max(peaks) / middle, 1.2)


def query_bench() -> None:
    import faiss

    from retrikt_ray.index.build import IndexConfig, build
    from retrikt_ray.index.search import Searcher
    from retrikt_ray.index.vectors import Column
    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.runtime.tables import Source

    folder = table(ROWS)
    print(
        f"\n{ROWS:,} x {DIM}, one thread, k 10, milliseconds:\n\n| index | shards | batch | plain p50 | ours p50 | ratio | plain p99 | ours p99 | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for factory, shards in (("Flat", 2), ("IVF4096,Flat", 2), (FACTORY, 1), (FACTORY, 2), (FACTORY, 4)):
        out = ROOT / f"query-{factory}-{shards}"
        if not (out / "index.json").exists():
            faiss.omp_set_num_threads(2)
            build(
                IndexConfig(factory=factory, shards=shards),
                Source.of(Folder.at(folder)),
                Column("vector", DIM),
                Folder.at(out),
                queries=queries(100),
                words=False,
                seed=0,
                workers=None,
            )
        searcher = Searcher.unsealed(Folder.at(out))
        # Plain FAISS: one index in memory. For IVF it is the very object that the searcher asks: where malloc happens to put
        # the centroids alone makes a product of matrices up to 20 % quicker or slower.
        index = searcher.shards[0].index
        if factory == "Flat":
            index = faiss.read_index(str(out / "shard-0000.faiss"))
            index.merge_from(faiss.read_index(str(out / "shard-0001.faiss")))
        else:
            assert len(searcher.shards) == 1
            index.nprobe = searcher.nprobe
        faiss.omp_set_num_threads(1)
        asked = queries(64 * 40)
        for batch, rounds in ((1, 1000), (64, 400)):
            if factory == "Flat":
                rounds //= 10
            times: dict[str, list[float]] = {"plain": [], "ours": []}
            ways = [("plain", index.search), ("ours", searcher.search)]
            for r in range(rounds + 4):
                for i, (name, search) in enumerate(ways if r % 2 else ways[::-1]):  # a batch that the caches do not know from the other way
                    part = np.ascontiguousarray(asked[((2 * r + i) * batch) % (len(asked) - batch + 1) :][:batch])
                    began = time.perf_counter()
                    search(part, 10)
                    if r >= 4:
                        times[name].append(time.perf_counter() - began)
            # The positions may differ where similarities tie.
            assert np.allclose(searcher.search(asked[:batch], 10)[1], index.search(asked[:batch], 10)[0], atol=1e-5)
            half = {n: (np.percentile(t, 50) * 1e3, np.percentile(t, 99) * 1e3) for n, t in times.items()}
            cells = [f"{half['plain'][i]:.3f} | {half['ours'][i]:.3f} | {half['ours'][i] / half['plain'][i]:.3f}" for i in (0, 1)]
            probes = "" if factory == "Flat" else f", {searcher.nprobe} probes"
            print(f"| {factory}{probes} | {shards} | {batch} | {cells[0]} | {cells[1]} |", flush=True)
            found.append((f"p50 against plain faiss, {factory}, {shards} shards, batch {batch}", half["ours"][0] / half["plain"][0]))
        del index, searcher
    print()
    for what, ratio in found:
        if what.endswith("64"):
            bar(what, ratio, 1.05)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what in ("plain", "ours", "watched"):
        {"plain": plain, "ours": ours, "watched": partial(ours, watched=True)}[what](Path(rest[0]), Path(rest[1]), int(rest[2]))
    else:
        {"build": build_bench, "memory": memory_bench, "query": query_bench}[what]()
        sys.exit(f"missed: {'; '.join(MISSED)}" if MISSED else 0)
