"""A run directory that Predictor opens, made in a second and without training: random weights, twelve rows, two shards."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from retrikt_ray.index.build import IndexConfig, build_index
from retrikt_ray.index.learning import learn
from retrikt_ray.index.mixture import Mixture
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.artifacts import Manifest
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.store.rows import store_schema
from retrikt_ray.student.kinds import StudentConfig
from retrikt_ray.student.model import Student, StudentModel

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
VALIDATION = pa.schema([("text", pa.string()), ("text_pair", pa.string()), ("value", pa.float64())])
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


def make_student(pair: bool, outputs: int, seed: int, kind: str = "static") -> Student:
    """A static (or convolution) student with random weights over a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]")
    torch.manual_seed(seed)
    size = len(vocabulary)
    model = StudentModel(StudentConfig(kind=kind, vocabulary=size, full_vocabulary=size, dim=8, outputs=outputs, pair=pair, max_tokens=32))
    with torch.no_grad():
        model.token_map.copy_(torch.arange(size))
        model.embedding.weight.normal_()
        model.importance.weight.normal_()
        model.head.weight.normal_()
        if kind == "convolution":
            model.filters.weight.normal_()
            model.filters.bias.normal_()
        if outputs == 1:
            model.shift.fill_(2.5)
            model.scale.fill_(1.5)
    return Student(model.eval(), tokenizer)


def make_run(
    path: Path | str,
    *,
    pair: bool = False,
    regression: bool = False,
    mixture: Mixture | None = None,
    seed: int = 0,
    kind: str = "static",
    learnt: tuple[str, ...] = (),
    **index: Any,
) -> Folder:
    """Write config.yaml, task/, student/, store/ (two parts) and index/ (two shards), each sealed over the others as the pipeline does.

    learnt: sources that the n-gram memory has learnt from; none: all.
    """
    run = Folder.at(path)
    rng = np.random.default_rng(seed)
    run.write_bytes("config.yaml", b"seed: 0\n")
    sealed: dict[str, Manifest] = {}

    def seal(name: str, *inputs: str, config: IndexConfig | None = None) -> None:
        contents, view = {i: sealed[i].content for i in inputs}, config.fingerprint_view() if config else {}
        sealed[name] = artifacts.seal(
            run / name, stage=name, fingerprint="tiny", config=view, inputs=contents, seed=seed, started=time.time()
        )

    card = {"name": "tiny", "problem": "regression" if regression else "classification", "labels": [] if regression else LABELS}
    validation = [{"text": t, "text_pair": TEXTS[0] if pair else None, "value": 1.0} for t in TEXTS[:3]]
    (run / "task").write_table("validation.parquet", pa.Table.from_pylist(validation, schema=VALIDATION))
    (run / "task").write_json("task.json", card | {"conditions": LABELS, "template": "{label}: ", "pair": pair, "metric": "accuracy"})
    seal("task")

    student = make_student(pair, 1 if regression else len(LABELS), seed, kind)
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
    for part, (low, high) in enumerate(((0, 7), (7, 12))):
        (run / "store").write_table(f"part-{part:05d}.parquet", pa.Table.from_pylist(rows[low:high], schema=store_schema(4)))
    seal("store", "task")

    queries = student.encode([(r["text"], r["text_pair"]) for r in rows])[1].numpy()
    config = IndexConfig(**({"shards": 2} | index))
    wanted = [np.array([not learnt or row["source"] in learnt for row in rows])]
    more: Any = {"seed": seed, "workers": None, "sources": learnt, "memory": learn(run / "store", seed, None, wanted)[0]}
    build_index(config, run / "store", run / "student", run / "index", queries, **more)
    (run / "index").write_json("mixture.json", asdict(mixture or Mixture(0.5, 0.3, 0.2, 0.3, 8, 0.1, 4, 1.0)))
    seal("index", "task", "store", "student", config=config)
    return run
