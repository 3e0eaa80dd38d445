"""A run directory that Predictor opens, made in a second and without training: random weights, twelve rows, two shards."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from retrikt_ray import artifacts
from retrikt_ray.annotate import store_schema
from retrikt_ray.artifacts import Manifest
from retrikt_ray.folders import Folder
from retrikt_ray.index import build_shard, train_index
from retrikt_ray.predictor import Mixture
from retrikt_ray.student import Student, StudentConfig, StudentModel

WORDS = [
    "a",
    "the",
    "film",
    "play",
    "plot",
    "cast",
    "is",
    "was",
    "fine",
    "warm",
    "brave",
    "sharp",
    "dull",
    "cold",
    "slow",
    "weak",
    "and",
    "but",
    "very",
    "never",
]
LABELS = ["negative", "positive"]
TEXTS = [
    "a fine film",
    "the play is warm",
    "a brave plot and a sharp cast",
    "the cast was very fine",
    "a warm and brave film",
    "never dull",
    "a dull film",
    "the play is cold",
    "a slow plot and a weak cast",
    "the cast was very weak",
    "a cold and slow film",
    "never fine",
]


def make_student(pair: bool, outputs: int, seed: int) -> Student:
    """A static student with random weights over a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]")
    torch.manual_seed(seed)
    size = len(vocabulary)
    model = StudentModel(
        StudentConfig(kind="static", vocabulary=size, full_vocabulary=size, dim=8, outputs=outputs, pair=pair, max_tokens=32)
    )
    with torch.no_grad():
        model.token_map.copy_(torch.arange(size))
        model.embedding.weight.normal_()
        model.importance.weight.normal_()
        model.head.weight.normal_()
        if outputs == 1:
            model.shift.fill_(2.5)
            model.scale.fill_(1.5)
    return Student(model.eval(), tokenizer)


def make_run(path: Path | str, *, pair: bool = False, regression: bool = False, mixture: Mixture | None = None, seed: int = 0) -> Folder:
    """Write config.yaml, task/, student/, store/ (two parts) and index/ (two shards), each sealed over the others as the pipeline does."""
    run = Folder.at(path)
    rng = np.random.default_rng(seed)
    run.write_bytes("config.yaml", b"seed: 0\n")
    sealed: dict[str, Manifest] = {}

    def seal(name: str, *inputs: str) -> None:
        contents = {i: sealed[i].content for i in inputs}
        sealed[name] = artifacts.seal(
            run / name, stage=name, fingerprint="tiny", config={}, inputs=contents, seed=seed, started=time.time()
        )

    card = {"name": "tiny", "problem": "regression" if regression else "classification", "labels": [] if regression else LABELS}
    (run / "task").write_json("task.json", card | {"conditions": LABELS, "template": "{label}: ", "pair": pair, "metric": "accuracy"})
    seal("task")

    student = make_student(pair, 1 if regression else len(LABELS), seed)
    with tempfile.TemporaryDirectory() as folder:
        student.save(folder)
        (run / "student").upload(Path(folder))
    seal("student", "task")

    rows = []
    for i, text in enumerate(TEXTS):
        score = 0.95 - 0.02 * i if i < 6 else 0.05 + 0.02 * (i - 6)  # the first six are positive
        rows.append(
            {
                "id": f"train-{i:06d}",
                "text": text,
                "text_pair": TEXTS[-1 - i] if pair else None,
                "asked_label": None if i % 2 else LABELS[int(i < 6)],
                "condition": int(i < 6),
                "value": float(i < 6),
                "teacher_probs": [5 * score] if regression else [1 - score, score],
                "teacher_embedding": rng.normal(size=4).tolist(),
                "source": "generated" if i % 2 else "task",
                "created_by": "tiny",
            }
        )
    vectors = student.encode([(r["text"], r["text_pair"]) for r in rows])[1].numpy()
    scratch = run / ".scratch/index"
    for part, (low, high) in enumerate(((0, 7), (7, 12))):
        name = f"part-{part:05d}.parquet"
        (run / "store").write_table(name, pa.Table.from_pylist(rows[low:high], schema=store_schema(4)))
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[low:high].reshape(-1)), vectors.shape[1])
        scratch.write_table(name, pa.table({"vector": column}))
    seal("store", "task")

    index, parts, trained = run / "index", [("part-00000.parquet", 0), ("part-00001.parquet", 7)], train_index("Flat", vectors, 16)
    shards = [
        build_shard(trained, scratch, parts, low, high, index, f"shard-{i:04d}.faiss") for i, (low, high) in enumerate(((0, 5), (5, 12)))
    ]
    index.write_table("ids.parquet", pa.table({"id": [r["id"] for r in rows]}))
    index.write_json("index.json", {"factory": "Flat", "width": vectors.shape[1], "rows": 12, "metric": "cosine", "shards": shards})
    index.write_json("mixture.json", asdict(mixture or Mixture(0.6, 0.4, 8, 0.1)))
    seal("index", "task", "store", "student")
    scratch.remove()
    return run
