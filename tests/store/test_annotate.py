"""The stage that makes the store: the order of its sources, and what is written. (Its actors need Ray: test_pipeline.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrikt_ray.runtime.cluster import Workers
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source
from retrikt_ray.store import annotate as annotating
from retrikt_ray.store.annotate import CHUNK, chunk_rows, rows_at, sources, write
from retrikt_ray.store.decide import KEPT, REASONS, AnnotateConfig, decide
from retrikt_ray.store.rows import ANNOTATED
from retrikt_ray.task.card import Task


def test_workers_share_a_small_store() -> None:
    assert [chunk_rows(total) for total in (0, 1000, 6000, 24_576, 10**7)] == [64, 64, 125, 512, 512]


def test_sources_come_in_the_order_in_which_duplicates_are_resolved(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Task rows first, generated ones last; long files in chunks; every row in exactly one of them."""
    monkeypatch.setattr(annotating, "CHUNKS", 1)
    task, generated = Folder.at(tmp_path / "task"), Folder.at(tmp_path / "generated")
    for folder, name, rows in (
        (generated, "part-00001.parquet", 3),
        (generated, "part-00000.parquet", CHUNK),
        (task, "unlabelled.parquet", 0),
        (task, "train.parquet", CHUNK + 1),
    ):
        folder.write_table(name, pa.table({"id": [str(i) for i in range(rows)]}))
    generated.write_bytes("manifest.json", b"{}")
    harvested = Folder.at(tmp_path / "harvested")
    harvested.write_table("part-00000.parquet", pa.table({"id": ["0", "1"]}))
    chunks = sources({"task": task, "generated": generated})
    with_corpus = sources({"task": task, "generated": generated, "harvested": harvested})
    assert [c["source"] for c in with_corpus] == ["task", "task", "corpus", "generated", "generated"] and with_corpus[2]["rows"] == 2
    assert [(c["part"], c["source"], c["name"], c["start"], c["rows"]) for c in chunks] == [
        (0, "task", "train.parquet", 0, CHUNK),
        (1, "task", "train.parquet", CHUNK, 1),
        (2, "generated", "part-00000.parquet", 0, CHUNK),
        (3, "generated", "part-00001.parquet", 0, 3),
    ]
    assert pq.read_metadata(pa.BufferReader(Folder(chunks[1]["uri"]).read_bytes(chunks[1]["name"]))).num_rows == CHUNK + 1


def test_rows_are_read_by_row_group(tmp_path: Any) -> None:
    table = pa.table({"id": [str(i) for i in range(10)]})
    pq.write_table(table, tmp_path / "some.parquet", row_group_size=4)
    for start, count in ((0, 3), (3, 2), (4, 4), (7, 3), (9, 1), (0, 10)):
        assert rows_at(Folder.at(tmp_path), "some.parquet", start, count)["id"].to_pylist() == [str(i) for i in range(start, start + count)]


def record(code: str, text: str, condition: int | None, value: float | None) -> dict[str, Any]:
    answer = {"probs": [0.2, 0.8], "embedding": [1.0, 2.0]} if text else {"probs": None, "embedding": None}
    return {"id": code, "text": text, "text_pair": None, "condition": condition, "value": value, "finished": True} | answer


def stage(path: Any, parts: list[tuple[str, list[dict[str, Any]]]]) -> tuple[dict[str, Folder], list[dict[str, Any]]]:
    """What `annotate` finds after its first step: held-out texts, and annotated parts of (source, records)."""
    folders = {name: Folder.at(path / name) for name in ("task", "generated", "scratch", "store", "rejected")}
    Task("t", "classification", ("no", "yes"), ("no", "yes"), "{label}: ", False, "accuracy").write(folders["task"])
    for split, text in (("validation", "a held out film"), ("test", "another held out film")):
        folders["task"].write_table(f"{split}.parquet", pa.table({"text": [text], "text_pair": pa.array([None], pa.string())}))
    folders["generated"].write_json("manifest.json", {"fingerprint": "f" * 64})
    for part, (_, rows) in enumerate(parts):
        folders["scratch"].write_table(f"part-{part:05d}.parquet", pa.Table.from_pylist(rows, schema=ANNOTATED))
    return folders, [{"part": part, "source": source, "rows": len(rows)} for part, (source, rows) in enumerate(parts)]


def decided(folders: dict[str, Folder], runs: list[list[dict[str, Any]]], workers: Workers | None = None, **config: Any) -> np.ndarray:
    return decide(AnnotateConfig(**config), runs, folders["task"], folders["scratch"], workers)


def names(codes: np.ndarray) -> list[str | None]:
    return [None if code == KEPT else REASONS[code] for code in codes.tolist()]


def test_passages_of_a_corpus_are_rows_like_others(tmp_path: Any) -> None:
    """A generated text that says what a passage does goes, copies of held-out texts go, and each row names the artifact that it is from."""
    passages = [record("corpus-0", "A new film", None, None), record("corpus-1", "A held out film!", None, None)]
    parts = [
        ("task", [record("train-0", "a fine film", 1, 1.0)]),
        ("corpus", passages),
        ("generated", [record("g-0", "a new film", 1, None)]),
    ]
    folders, chunks = stage(tmp_path, parts)
    folders["harvested"] = Folder.at(tmp_path / "harvested")
    folders["harvested"].write_json("manifest.json", {"fingerprint": "c" * 64})
    by_source, reasons = write([chunks], decided(folders, [chunks]), folders, folders, 2, None)
    assert dict(by_source) == {"task": 1, "corpus": 1} and dict(reasons) == {"leakage": 1, "duplicate": 1}
    kept = folders["store"].read_tables().to_pylist()
    assert [(r["id"], r["source"], r["asked_label"], r["created_by"]) for r in kept] == [
        ("train-0", "task", "yes", "f" * 16),
        ("corpus-0", "corpus", None, "c" * 16),
    ]


LONG = "the film begins slowly but the second half is worth the wait"


def test_rows_are_decided_over_the_whole_store(tmp_path: Any) -> None:
    """Held-out texts of both splits, and duplicates across parts, are kept out of the store; each row ends in one of the two tables."""
    parts = [
        (
            "task",
            [record("train-0", "a fine film", 1, 1.0), record("train-1", "Another held-out film", 0, 0.0), record("train-2", LONG, 1, 1.0)],
        ),
        (
            "generated",
            [record("g-0", "A fine film!", 1, None), record("g-1", "a held out film", 0, None), record("g-2", "a new film", 0, None)],
        ),
        (
            "generated",
            [
                record("g-3", "a new  film", 1, None),
                record("g-4", "", 1, None),
                record("g-6", "", 1, None) | {"error": "E: why"},
                record("g-5", LONG + " indeed", 1, None),
            ],
        ),
    ]
    folders, chunks = stage(tmp_path, parts)
    reasons_of = decided(folders, [chunks])
    by_source, reasons = write([chunks[:2], chunks[2:]], reasons_of, folders, folders, 2, None)
    assert dict(by_source) == {"task": 2, "generated": 1}
    assert dict(reasons) == {"leakage": 2, "duplicate": 2, "empty": 1, "failed": 1, "near_duplicate": 1}
    kept = folders["store"].read_tables().to_pylist()
    assert folders["store"].files() == folders["rejected"].files() == ["part-00000.parquet", "part-00001.parquet"]
    groups = [(name, rows) for name, _, _, rows in Source.of(folders["rejected"]).groups]  # one of each chunk that has such rows
    assert groups == [("part-00000.parquet", 1), ("part-00000.parquet", 2), ("part-00001.parquet", 4)]
    assert [(r["id"], r["asked_label"], r["value"], r["source"]) for r in kept] == [
        ("train-0", "yes", 1.0, "task"),
        ("train-2", "yes", 1.0, "task"),
        ("g-2", "no", None, "generated"),
    ]
    assert {r["created_by"] for r in kept} == {"f" * 16}
    rejected = {r["id"]: r["reason"] for r in folders["rejected"].read_tables().to_pylist()}
    assert rejected == {
        "train-1": "leakage",
        "g-0": "duplicate",
        "g-1": "leakage",
        "g-3": "duplicate",
        "g-4": "empty",
        "g-6": "failed",
        "g-5": "near_duplicate",
    }
    without = names(decided(folders, [chunks], near_duplicates=1))
    assert without[6:] == ["duplicate", "empty", "failed", None] and without[:6] == names(reasons_of)[:6]


def test_decisions_do_not_depend_on_how_rows_are_cut(cluster: None, tmp_path: Any) -> None:
    """Into parts, and into runs that tasks take side by side."""
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(words[:i] + words[i + 1 + i % 3 :]) for i in range(12)] + [f"no {i} like it" for i in range(12)]
    records = [record(f"g-{i}", text, i % 2, None) for i, text in enumerate(texts)]
    found = []
    for size, workers in ((1, None), (5, Workers(2, 1, 0)), (24, None)):
        folders, chunks = stage(tmp_path / str(size), [("generated", records[i : i + size]) for i in range(0, 24, size)])
        runs = [chunks[i : i + 2] for i in range(0, len(chunks), 2)]
        reasons = decided(folders, runs, workers)
        found.append(
            (names(reasons), dict(write(runs, reasons, folders, folders, 2, workers)[1]), folders["store"].read_tables().to_pylist())
        )
    assert found[0] == found[1] == found[2]
    assert 8 <= found[0][0].count("near_duplicate") <= 11 and found[0][0][12:] == [None] * 12
