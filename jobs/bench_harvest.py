"""Time and memory of harvesting 10, 40 and all MB of a corpus for a run that has a teacher: `python -m jobs.bench_harvest RUN [MB ...]`.

The corpus is $RETRIKT_DATA/text. Memory is what the driver and Ray's workers have together at most (proportional set size), each size in a process
and a Ray of its own.
"""

import multiprocessing
import os
import sys
import tempfile
import time

from retrikt_ray.estimate.estimate import watched_memory
from retrikt_ray.pipeline import load_run
from retrikt_ray.runtime import cluster
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import listening
from retrikt_ray.store.harvest import HarvestConfig, harvest


def measured(uri: str, megabytes: float) -> None:
    run = load_run(uri)
    inputs = {name: run.artifact(name) for name in ("task", "teacher")} | {"corpus": Folder.at(f"{os.environ['RETRIKT_DATA']}/text")}
    with tempfile.TemporaryDirectory() as folder, listening() as trackers:
        out = {name: Folder.at(f"{folder}/{name}") for name in ("harvested", "scratch")}
        cluster.connect(None)
        began = time.monotonic()
        with watched_memory() as peak:
            told = harvest(HarvestConfig(megabytes=megabytes), inputs, out, seed=0)
        seconds = time.monotonic() - began
        size = trackers[0].total
    steps = " | ".join(f"{tracker.points[-1][0]:.0f}" for tracker in trackers)
    print(f"| {size:.0f} | {told['passages']:,} | {told['candidates']:,} | {steps} | {seconds:.0f} | {peak[0]:,.0f} |", flush=True)


def main() -> None:
    print("| MB | passages | candidates | passages, s | candidates, s | all, s | peak, MB |")
    print("|---" * 7 + "|")
    for megabytes in [float(size) for size in sys.argv[2:]] or [10, 40, 0]:
        process = multiprocessing.get_context("spawn").Process(target=measured, args=(sys.argv[1], megabytes))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
