"""Benchmark of editing a large store: `python -m jobs.bench_edit`. The figures of docs/benchmarks.md come from here.

A run of 1,000,000 made-up texts with a random student of 128 dimensions and an exact (Flat) index. 10,000 rows are added through the API, and
found by another reader that was open all along; then the store is compacted, and compared with an index that was built from scratch of the same rows.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROOT = Path(os.environ.get("RETRIKT_BENCH", "runs/bench-index"))
ROWS = int(os.environ.get("RETRIKT_BENCH_ROWS", 1_000_000))
ADDED, DIM, PART = 10_000, 128, 50_000
LABELS = ["negative", "positive"]


def vocabulary() -> np.ndarray:
    """20,000 made-up words; the n-th is drawn with a chance of about 1 / n, as in language."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    rng = np.random.default_rng(0)
    return np.array(sorted({"".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(40_000)})[:20_000])


def texts(rng: np.random.Generator, words: np.ndarray, count: int) -> list[str]:
    ranks = np.minimum(rng.zipf(1.3, (count, 12)) - 1, len(words) - 1)
    lengths = rng.integers(5, 13, count)
    return [" ".join(words[row[:n]]) for row, n in zip(ranks, lengths, strict=True)]


def seal(folder: Any, **more: Any) -> str:
    from retrikt_ray.runtime import artifacts

    values = {"stage": "bench", "fingerprint": "bench", "config": {}, "inputs": {}, "seed": 0, "started": time.time()} | more
    return artifacts.seal(folder, **values).content


def make_base(run: Any, words: np.ndarray) -> None:
    """config.yaml, task/ and student/: all of a run but store and index."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from retrikt_ray.student.kinds import StudentConfig
    from retrikt_ray.student.model import Student, StudentModel
    from retrikt_ray.task.card import Task

    run.write_bytes("config.yaml", b"seed: 0\nindex: {factory: Flat}\n")
    Task("bench", "classification", tuple(LABELS), tuple(LABELS), "", False, "accuracy").write(run / "task")
    rows = {"text": texts(np.random.default_rng(5), words, 64), "text_pair": pa.nulls(64, pa.string()), "value": np.zeros(64)}
    (run / "task").write_table("validation.parquet", pa.table(rows))
    seal(run / "task")
    plain = Tokenizer(WordLevel({w: i for i, w in enumerate(["[UNK]", "[PAD]", *words.tolist()])}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]")
    torch.manual_seed(0)
    size = len(words) + 2
    model = StudentModel(StudentConfig(vocabulary=size, full_vocabulary=size, dim=DIM, outputs=2))
    with torch.no_grad():
        model.token_map.copy_(torch.arange(size))
        model.embedding.weight.normal_()
        model.importance.weight.normal_()
    with tempfile.TemporaryDirectory() as folder:
        Student(model.eval(), tokenizer).save(folder)
        (run / "student").upload(Path(folder))
    seal(run / "student")


def make_store(run: Any, words: np.ndarray) -> None:
    from retrikt_ray.store.rows import store_schema

    schema, rng = store_schema(1), np.random.default_rng(1)
    for part, start in enumerate(range(0, ROWS, PART)):
        count = min(PART, ROWS - start)
        sure = rng.random(count).astype(np.float32)
        columns = {
            "id": [f"row-{start + i:07d}" for i in range(count)],
            "text": texts(rng, words, count),
            "teacher_probs": np.stack([1 - sure, sure], 1).tolist(),
            "teacher_embedding": [[0.0]] * count,
            "source": ["generated"] * count,
        }
        arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type) for f in schema]
        (run / "store").write_table(f"part-{part:05d}.parquet", pa.Table.from_arrays(arrays, schema=schema))
    seal(run / "store")


def index(run: Any, workers: Any) -> float:
    """Build and seal RUN/index as the index stage does; seconds."""
    from retrikt_ray.index.build import IndexConfig, build_index
    from retrikt_ray.index.mixture import Mixture
    from retrikt_ray.runtime.artifacts import check

    began, config = time.perf_counter(), IndexConfig(factory="Flat")
    build_index(config, run / "store", run / "student", run / "index", np.zeros((0, DIM), np.float32), seed=0, workers=workers)
    (run / "index").write_json("mixture.json", asdict(Mixture(0.5, 0.3, 0.2, 0.3, 8, 0.05, 8, 1.0)))
    inputs = {n: check(run / n).content for n in ("task", "store", "student")}
    seal(run / "index", config=config.fingerprint_view(), inputs=inputs)
    return time.perf_counter() - began


def main() -> None:
    import ray

    from retrikt_ray.knowledge.compact import compact, write_live
    from retrikt_ray.knowledge.knowledge import Knowledge
    from retrikt_ray.knowledge.log import read_edit
    from retrikt_ray.predictor import Predictor
    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.cluster import Workers
    from retrikt_ray.runtime.folders import Folder

    cluster.quiet(None)
    words, root = vocabulary(), ROOT / f"edit-{ROWS}"
    shutil.rmtree(root, ignore_errors=True)
    run, anew = Folder.at(root / "run"), Folder.at(root / "fresh")
    make_base(run, words)
    make_store(run, words)
    cluster.connect((root / "ray.log").absolute())
    workers = Workers(2, 1, 0)
    built = index(run, workers)
    began = time.perf_counter()
    predictor = Predictor.open(run)
    opened = time.perf_counter() - began
    reader = Knowledge.open(run)
    print(f"{ROWS:,} rows: index built in {built:.1f} s, opened and verified in {opened:.1f} s", flush=True)

    # added, and found by a reader that was open before
    rng = np.random.default_rng(2)
    rows = [{"id": f"added-{i:05d}", "text": t, "label": LABELS[i % 2]} for i, t in enumerate(texts(rng, words, ADDED))]
    vectors = predictor.student.encode([(r["text"], None) for r in rows])[1].numpy()
    reader.view.search(vectors[:1], 1)
    began = time.perf_counter()
    predictor.knowledge.add(rows)
    acknowledged = time.perf_counter() - began
    assert reader.refresh()
    first = reader.view.search(vectors[-1:], 10)
    found = time.perf_counter() - began
    assert rows[-1]["id"] in first.ids[0]
    hits = reader.view.search(vectors, 50)
    own = sum(r["id"] in ids for r, ids in zip(rows, hits.ids, strict=True))
    print(
        f"{ADDED:,} rows added: acknowledged after {acknowledged:.2f} s, found by another reader after {found:.2f} s; {own:,} of them by their own text",
        flush=True,
    )
    predictor.knowledge.delete([f"row-{i:07d}" for i in range(0, ROWS, 1000)])
    reader.refresh()
    asked = predictor.student.encode([(t, None) for t in texts(np.random.default_rng(3), words, 512)])[1].numpy()
    queries = [(t, None) for t in texts(np.random.default_rng(4), words, 64)]
    before = reader.view.search(asked, 20), reader.view.search_words(queries, 20)

    # an index from scratch of the same rows, in a run of its own
    for name in ("task", "student"):
        (anew / name).upload(Path((run / name).uri))
    anew.write_bytes("config.yaml", run.read_bytes("config.yaml"))
    log = reader.view.log
    assert log is not None
    write_live(run / "store", [read_edit(run / "knowledge", e) for e in log.edits], anew / "store")
    seal(anew / "store")
    rebuilt = index(anew, workers)
    fresh = Knowledge.open(anew)
    want = fresh.view.search(asked, 20), fresh.view.search_words(queries, 20)

    # compacted
    began = time.perf_counter()
    assert compact(run, workers) is not None
    compacted = time.perf_counter() - began
    reader.refresh()
    after = reader.view.search(asked, 20), reader.view.search_words(queries, 20)
    for name, got in (("before compaction", before), ("after compaction", after)):
        same = [g.ids == w.ids and np.array_equal(g.scores, w.scores) for g, w in zip(got, want, strict=True)]
        print(f"{name}: ids and scores of a fresh build: dense {same[0]}, lexical {same[1]}")
        if not all(same):
            sys.exit(1)
    print(f"compaction {compacted:.1f} s, a fresh build {rebuilt:.1f} s")
    ray.shutdown()
    shutil.rmtree(root)
    if found > 2:
        sys.exit(f"the added rows were found after {found:.2f} s; the bar is 2 s")


if __name__ == "__main__":
    main()
