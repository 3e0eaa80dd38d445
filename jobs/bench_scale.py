"""What each stage takes by the number of rows, on made-up ones: `python -m jobs.bench_scale`, or with sizes; `requests`: what S3 is asked.

The commands are run as a user runs them (`retrikt annotate RUN` and so on), over a task, a teacher and generated texts that are made here: 8 to 24 words,
a teacher of 64 dimensions with random weights that annotates thousands of rows a second, 20 labels. Watched from outside: the peak memory (RSS) of the
driver, and of the largest of Ray's worker processes. `replica` is one that has opened the run and answers. Requests are the increase from one size to
the next, as moto's server counts them.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import yaml

ROOT = Path(os.environ.get("RETRIKT_BENCH_DIR", "/tmp/retrikt-bench-scale"))
SIZES = (100_000, 400_000, 1_600_000)
FEW = (4_000, 12_000)  # rows, to count requests by
STAGES = ("annotate", "distill", "index", "evaluate", "replica")
CLASSES, WIDTH, WORDS, SHARD = 20, 64, 20_000, 2_000
GROWTH = 1.2  # of the driver and of the trainer, the largest peak against the smallest
CONFIG = {
    "prepare": {"data": "made-up"},
    "annotate": {"workers": 2, "cpus_per_worker": 1},
    "distill": {"workers": 1, "cpus_per_worker": 1, "epochs": 1, "size": 0.2},
    "index": {"workers": 2, "cpus_per_worker": 1},
    "evaluate": {"workers": 2, "cpus_per_worker": 1, "baselines": False, "store_fractions": []},
}


def texts(rng: np.random.Generator, count: int) -> list[str]:
    """Made-up texts of 8 to 24 words, a word's chance about 1 / rank."""
    ranks = np.minimum(WORDS ** rng.random((count, 24)), WORDS - 1).astype(int)
    return [" ".join(f"w{w}" for w in row[: 8 + i % 17]) for i, row in enumerate(ranks)]


def teacher(folder: str, width: int, layers: int) -> None:
    """An encoder with random weights, as Hugging Face saves it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(WORDS))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32, "intermediate_size": 4 * width}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=0.3, **shape)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def make(rows: int, uri: str, width: int = WIDTH, layers: int = 1) -> None:
    """A run in which everything before `annotate` is done. width, layers: of its teacher."""
    from retrikt_ray.runtime import artifacts
    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.store.rows import GENERATED
    from retrikt_ray.task.card import Task
    from retrikt_ray.teacher.annotator import Annotator

    run, rng = Folder.at(uri), np.random.default_rng(0)
    labels = tuple(f"c{i}" for i in range(CLASSES))
    Task("made up", "classification", labels, labels, "{label}: ", False, "accuracy").write(run / "task")
    for split, count in (("train", 500), ("validation", 500), ("test", 500), ("unlabelled", 0)):
        value = [float(i % CLASSES) for i in range(count)]
        columns = {"id": [f"{split}-{i}" for i in range(count)], "text": texts(rng, count), "text_pair": pa.nulls(count, pa.string())}
        columns |= {
            "value": pa.array(value, pa.float64()),
            "label": [labels[int(v)] for v in value],
            "condition": pa.array(value).cast("int32"),
        }
        (run / "task").write_table(f"{split}.parquet", pa.table(columns))
    with tempfile.TemporaryDirectory() as folder:
        teacher(folder, width, layers)
        annotator = Annotator.start(folder, "", "float32", CLASSES, 0, 32)
    annotator.save(run / "teacher", "made up", "", "float32")
    card = {"annotator": "made up", "base": "none", "parameters": annotator.parameter_count, "max_tokens": 32}
    (run / "teacher").write_json("teacher.json", card)
    (run / "policy").write_json("curves.json", {"curve": [], "watch": [], "best_step": 0, "collapse": None})
    for part, low in enumerate(range(0, rows, SHARD)):
        count = min(SHARD, rows - low)
        table = {
            "id": [f"generated-{low + i:08d}" for i in range(count)],
            "text": texts(rng, count),
            "text_pair": pa.nulls(count, pa.string()),
            "condition": pa.array([i % CLASSES for i in range(count)], pa.int32()),
            "finished": [True] * count,
            "tokens": pa.array([20] * count, pa.int32()),
            "error": pa.nulls(count, pa.string()),
        }
        (run / "generated").write_table(f"part-{part:05d}.parquet", pa.table(table, GENERATED))
    run.write_bytes("config.yaml", yaml.safe_dump(CONFIG).encode())
    for name in ("task", "teacher", "policy", "generated"):
        artifacts.seal(run / name, stage=name, fingerprint="made up", config={}, inputs={}, seed=0, started=time.time())


def replica(uri: str) -> None:
    """Open a run as Serve does, and answer 200 texts, one after another."""
    import asyncio

    from retrikt_ray.serving.answering.job import Job
    from retrikt_ray.serving.replica import Endpoint

    endpoint = Endpoint({"run": uri, "open": "read"})

    async def ask() -> None:
        for text in texts(np.random.default_rng(1), 200):
            await endpoint.ask(Job("predict", [(text, None)], (1, False)))

    asyncio.run(ask())


def memory(process: psutil.Process) -> float:
    """MB, libraries and mapped files that others have, too, included."""
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.NoSuchProcess:
        return 0.0


def is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::")
    except psutil.NoSuchProcess:
        return False


def watched(command: list[str], env: dict[str, str]) -> tuple[float, float, float]:
    """Run it. Seconds, and the peak memory in MB of its process and of the largest of Ray's workers below it."""
    began, driver, worker = time.perf_counter(), 0.0, 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as started:
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(started.stdout or ()))
        reader.start()
        process = psutil.Process(started.pid)
        while started.poll() is None:
            driver = max(driver, memory(process))
            worker = max([worker, *(memory(child) for child in process.children(recursive=True) if is_worker(child))])
            time.sleep(0.2)
        reader.join()
    if started.returncode:
        sys.exit("".join(said))
    return time.perf_counter() - began, driver, worker


def command_of(stage: str, run: str) -> list[str]:
    return [sys.executable, "-m", *(["jobs.bench_scale", "replica"] if stage == "replica" else ["retrikt_ray", stage]), run]


def by_size(sizes: tuple[int, ...]) -> None:
    """Seconds and memory. Exits with what grew too much."""
    print("| stage | rows | seconds | a million rows, s | driver, MB | largest worker, MB |\n|---|---|---|---|---|---|", flush=True)
    peaks: dict[str, list[float]] = {}
    for rows in sizes:
        run = ROOT / str(rows)
        shutil.rmtree(run, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "jobs.bench_scale", "make", str(rows), str(run)], check=True)
        for stage in STAGES:
            seconds, driver, worker = watched(command_of(stage, str(run)), dict(os.environ))
            if stage != "replica":
                peaks.setdefault(f"driver of {stage}", []).append(driver)
            if stage == "distill":
                peaks.setdefault("trainer", []).append(worker)
            print(f"| {stage} | {rows:,} | {seconds:,.0f} | {seconds / rows * 1e6:,.0f} | {driver:,.0f} | {worker:,.0f} |", flush=True)
        shutil.rmtree(run)
    growth = {name: max(found) / min(found) for name, found in peaks.items()}
    print("\nlargest peak against the smallest: " + ", ".join(f"{name} {times:.2f}" for name, times in growth.items()))
    if over := [name for name, times in growth.items() if times > GROWTH]:
        sys.exit(f"more than {GROWTH}: {', '.join(over)}")


@contextmanager
def counting_server() -> Iterator[tuple[dict[str, str], Path]]:
    """moto with a bucket `runs`: the environment that leads to it, and its log, with a line for each request."""
    import boto3
    from botocore.exceptions import EndpointConnectionError

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ.update(env | {"AWS_DEFAULT_REGION": "us-east-1"})
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
        try:
            while True:
                try:
                    boto3.client("s3").create_bucket(Bucket="runs")
                    break
                except EndpointConnectionError:
                    time.sleep(0.5)
            yield dict(os.environ), Path(log.name)
        finally:
            server.terminate()
            server.wait()


def requests(sizes: tuple[int, int]) -> None:
    """Requests to an object store for a thousand rows more."""
    found: dict[str, list[int]] = {stage: [] for stage in STAGES}
    with counting_server() as (env, log):
        for rows in sizes:
            uri = f"s3://runs/{rows}"
            make(rows, uri)
            for stage in STAGES:
                before = len(re.findall(r'"[A-Z]+ /runs', log.read_text()))
                watched(command_of(stage, uri), env)
                found[stage].append(len(re.findall(r'"[A-Z]+ /runs', log.read_text())) - before)
    print(f"| stage | {sizes[0]:,} rows | {sizes[1]:,} rows | by 1,000 rows more |\n|---|---|---|---|")
    for stage, (few, many) in found.items():
        print(f"| {stage} | {few} | {many} | {(many - few) / (sizes[1] - sizes[0]) * 1e3:.1f} |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", rows, run, *shape]:
            make(int(rows), run, *map(int, shape))
        case ["replica", run]:
            replica(run)
        case ["requests"]:
            requests(FEW)
        case given:
            by_size(tuple(map(int, given)) or SIZES)
