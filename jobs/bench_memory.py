"""Peak memory of distillation and of the index stage by the size of the store: `python -m jobs.bench_memory`, on made-up rows.

Each size runs in a process of its own, with Ray workers of one thread. What is counted is the driver and Ray's workers together (PSS).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(os.environ.get("RETRIKT_BENCH_DIR", "/tmp/retrikt-bench-memory"))
SIZES = (10_000, 100_000, 400_000)
GROUP = 512  # rows of a row group, as annotate writes them
CLASSES, WIDTH, WORDS = 20, 128, 20_000
BAR = 1.25  # the largest peak against the smallest


def texts(rng: np.random.Generator, count: int) -> list[str]:
    """Made-up texts of 8 to 24 words, a word's chance about 1 / rank."""
    ranks = np.minimum(WORDS ** rng.random((count, 24)), WORDS - 1).astype(int)
    return [" ".join(f"w{w}" for w in row[: 8 + i % 17]) for i, row in enumerate(ranks)]


def make(rows: int, folder: Path) -> None:
    """task/, teacher/ and store/ of a run."""
    import torch

    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.store.rows import store_schema
    from retrikt_ray.teacher.annotator import Annotator

    run, rng = Folder.at(folder), np.random.default_rng(0)
    torch.manual_seed(0)
    teacher = Annotator.start("base", "embedded", "float32", CLASSES, 0, 32)
    (run / "teacher").write_json("teacher.json", {"parameters": teacher.parameter_count})
    teacher.save(run / "teacher", "base", "embedded", "float32")
    card = {
        "name": "made up",
        "problem": "classification",
        "labels": [f"c{i}" for i in range(CLASSES)],
        "conditions": [],
        "template": "{label}: ",
    }
    (run / "task").write_json("task.json", card | {"pair": False, "metric": "accuracy"})
    columns = {"text": texts(rng, 500), "text_pair": pa.array([None] * 500, pa.string()), "value": [float(i % CLASSES) for i in range(500)]}
    (run / "task").write_table("validation.parquet", pa.table(columns))
    for part, low in enumerate(range(0, rows, 16 * GROUP)):
        count = min(16 * GROUP, rows - low)
        table = pa.table(
            {
                "id": [f"generated-{low + i:07d}" for i in range(count)],
                "text": texts(rng, count),
                "text_pair": pa.array([None] * count, pa.string()),
                "asked_label": pa.array([None] * count, pa.string()),
                "condition": pa.array([0] * count, pa.int32()),
                "value": pa.array([None] * count, pa.float64()),
                "teacher_probs": rng.dirichlet(np.ones(CLASSES), count).astype("f").tolist(),
                "teacher_embedding": rng.normal(size=(count, WIDTH)).astype("f").tolist(),
                "source": ["task" if low + i < 500 else "generated" for i in range(count)],
                "created_by": ["made up"] * count,
            },
            schema=store_schema(WIDTH),
        )
        with (run / "store").create(f"part-{part:05d}.parquet") as path:
            pq.write_table(table, path, row_group_size=GROUP)
    (run / "store").write_json("store.json", {"kept": rows})


def measure(folder: Path, stage: str) -> None:
    """Run `distill` or `index` on a run's store; prints {seconds, peak} as JSON."""
    import ray

    from jobs.bench_index import watch_memory
    from retrikt_ray.index.build import IndexConfig
    from retrikt_ray.index.index import index
    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.student.distill import distill
    from retrikt_ray.student.fit import DistillConfig

    run = Folder.at(folder)
    inputs = {name: run / name for name in ("task", "teacher", "store", "student")}
    cluster.connect(Path(f"{folder}.log").absolute())
    peak, stop = watch_memory()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        if stage == "distill":
            config = DistillConfig(workers=1, cpus_per_worker=1, epochs=1)
            distill(config, inputs, {"student": run / "student", "scratch": Folder.at(scratch)}, seed=0)
        else:
            index(IndexConfig(workers=1, cpus_per_worker=1), inputs, {"index": run / "index"}, seed=0)
    stop.set()
    seconds = time.perf_counter() - began
    ray.shutdown()
    print(json.dumps({"seconds": seconds, "peak": peak["all"]}))


def alone(*arguments: object) -> dict[str, float]:
    """`make` or `measure` in a process of its own."""
    command = [sys.executable, "-m", "jobs.bench_memory", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    stages, peaks = ("distill", "index"), {}
    print("| rows | distill: peak, MB | seconds | index: peak, MB | seconds |\n|---|---|---|---|---|")
    for rows in SIZES:
        folder = ROOT / str(rows)
        shutil.rmtree(folder, ignore_errors=True)
        alone("make", rows, folder)
        found = [alone(stage, folder) for stage in stages]
        peaks[rows] = [f["peak"] for f in found]
        print(f"| {rows:,} | " + " | ".join(f"{f['peak']:,.0f} | {f['seconds']:.0f}" for f in found) + " |", flush=True)
    shutil.rmtree(ROOT)
    growth = [max(p[i] for p in peaks.values()) / peaks[SIZES[0]][i] for i in range(len(stages))]
    print("\n" + ", ".join(f"{stage}: {g:.2f} times the smallest" for stage, g in zip(stages, growth, strict=True)))
    if max(growth) > BAR:
        sys.exit(f"bar {BAR} missed")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "make":
        make(int(sys.argv[2]), Path(sys.argv[3]))
        print("{}")
    else:
        measure(Path(sys.argv[2]), sys.argv[1])
