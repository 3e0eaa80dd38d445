"""Two workers beside one, a CPU each, in turn: `make bench-workers`.

annotate: its command as a whole, with a teacher of the size of MiniLM-L6 and random weights. distill: what it reads, which is the store's tokens
counted, and an epoch of a training that only reads. The rows are those of `bench_scale`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from typing import Any

import numpy as np

from jobs.bench_scale import ROOT, command_of, watched

TURNS = 2
LABELLED, SHAPE = 60_000, ("384", "6")  # rows, and the width and layers of their teacher
READ = 400_000  # rows
BAR = 1.6


def read_loop(config: dict[str, Any]) -> None:
    """A training of one epoch that only reads. The first worker writes the seconds of the slowest."""
    import ray.train
    import torch
    import torch.distributed as dist

    from retrikt_ray.student.rows import load_store

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config["threads"])
    rows, _ = load_store(config["store"], 0)
    batches = rows.batches(128, 1, 0)
    if world > 1:
        dist.barrier()
    began = time.perf_counter()
    for step in range(len(batches)):
        rows.take(batches.parts(step, world)[rank])
    took = torch.tensor([time.perf_counter() - began])
    if world > 1:
        dist.all_reduce(took, dist.ReduceOp.MAX)
    if rank == 0:
        config["out"].write_json("took.json", took.item())


def reading(uri: str, count: int) -> dict[str, float]:
    """Seconds of what distill reads with so many workers."""
    from retrikt_ray.runtime import cluster, training
    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.student.distill import token_counts

    run, workers = Folder.at(uri), cluster.Workers(count, 1, 0)
    with tempfile.TemporaryDirectory() as name:
        scratch = Folder.at(name)
        began = time.perf_counter()
        token_counts({"store": run / "store", "teacher": run / "teacher"}, scratch / "tokens", workers)
        counted = time.perf_counter() - began
        training.launch(read_loop, {"store": run / "store", "out": scratch}, workers, scratch, "read", "bench: read")
        return {"tokens counted": counted, "an epoch read": float(scratch.read_json("took.json"))}


def main() -> None:
    from retrikt_ray.runtime import cluster

    took: dict[str, dict[int, list[float]]] = {}
    labelled, read = ROOT / "labelled", ROOT / "read"
    for run, rows, *shape in ((labelled, LABELLED, *SHAPE), (read, READ)):
        shutil.rmtree(run, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "jobs.bench_scale", "make", str(rows), str(run), *shape], check=True)
    for _, count in product(range(TURNS), (1, 2)):
        for name in ("store", "rejected"):
            shutil.rmtree(labelled / name, ignore_errors=True)
        seconds, *_ = watched([*command_of("annotate", str(labelled)), f"annotate.workers={count}"], dict(os.environ))
        took.setdefault(f"annotate, {LABELLED:,} rows", {}).setdefault(count, []).append(seconds)
    watched(command_of("annotate", str(read)), dict(os.environ))
    cluster.quiet(None)
    cluster.connect((ROOT / "ray.log").absolute())
    for _, count in product(range(TURNS), (1, 2)):
        for name, seconds in reading(str(read), count).items():
            took.setdefault(f"distill: {name}, {READ:,} rows", {}).setdefault(count, []).append(seconds)
    print(f"| means of {TURNS} | one worker, s | two, s | times |\n|---|---|---|---|")
    times = {}
    for name, found in took.items():
        one, two = (float(np.mean(found[count])) for count in (1, 2))
        times[name] = one / two
        print(f"| {name} | {one:.1f} | {two:.1f} | {one / two:.2f} |")
    for run in (labelled, read):
        shutil.rmtree(run)
    if slow := [name for name, ratio in times.items() if ratio < BAR]:
        sys.exit(f"less than {BAR} times: {', '.join(slow)}")


if __name__ == "__main__":
    main()
