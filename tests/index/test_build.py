"""Building: what is read, what is written, what is measured; and the choice of a factory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making.vectors import make_index, quarters, write_vectors

from retrikt_ray.index import build as shards
from retrikt_ray.index.build import IndexConfig, build, edges, recall, sampled, train
from retrikt_ray.index.factory import candidates, choose, lists
from retrikt_ray.index.vectors import Column
from retrikt_ray.runtime.cluster import Workers
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.runtime.tables import Source

FLAT = {"factory": "Flat", "shards": 3, "nprobe": 0, "memory_gb": 1.0, "latency_ms": 10.0}


def test_a_source_is_read_by_row_groups(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    write_vectors(folder, np.arange(14, dtype=np.float32).reshape(7, 2), 3)
    write_vectors(folder, np.arange(100, 108, dtype=np.float32).reshape(4, 2), 4, "part-00001.parquet")
    folder.write_table("part-00002.parquet", pa.table({"vector": pa.array([], pa.list_(pa.float32(), 2))}))  # all its rows were rejected
    source = Source.of(folder)
    files = ["part-00000.parquet"] * 3 + ["part-00001.parquet"]
    got = [g for g in source.groups if g[3]]
    assert got == [(f, i, first, n) for f, i, first, n in zip(files, (0, 1, 2, 0), (0, 3, 6, 7), (3, 3, 1, 4), strict=True)]
    assert source.rows == 11
    parts = [(first, Column("vector", 2).of(t).tolist()) for first, t in source.read(2, 9, ("vector",))]
    assert parts == [(2, [[4, 5]]), (3, [[6, 7], [8, 9], [10, 11]]), (6, [[12, 13]]), (7, [[100, 101], [102, 103]])]
    wanted = np.array([0, 2, 6, 10])
    assert sampled(source, Column("vector", 2), wanted).tolist() == [[0, 1], [4, 5], [12, 13], [106, 107]]
    with pytest.raises(ArtifactError, match=r"holds no part-\*\.parquet"):
        Source.of(folder / "nothing")


def test_a_build_never_reads_more_than_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    before = pq.ParquetFile.read_row_group

    def watched(self: pq.ParquetFile, i: int, **more: object) -> pa.Table:
        table = before(self, i, **more)
        read.append(len(table))
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    monkeypatch.setattr(Folder, "read_table", None)
    monkeypatch.setattr(shards, "TRAIN_ROWS", 200)
    make_index(tmp_path, np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32), 3, "IVF4,Flat", group=64)
    assert max(read) == 64


def test_each_shard_carries_its_checksum(tmp_path: Path) -> None:
    vectors = quarters(np.random.default_rng(0), 20, 4)
    folder = make_index(tmp_path, vectors, 3)
    card = folder.read_json("index.json")
    assert [(s["low"], s["high"]) for s in card["shards"]] == [(0, 6), (6, 13), (13, 20)] == edges(20, 3)
    for shard in card["shards"]:
        data = (tmp_path / "index-3" / shard["file"]).read_bytes()
        assert (shard["sha256"], shard["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
        part = vectors[shard["low"] : shard["high"]]
        assert shard["norm"] == pytest.approx(np.sqrt((part**2).sum(1)).max(), rel=1e-6)
    assert edges(2, 4) == [(0, 0), (0, 1), (1, 1), (1, 2)]


def test_index_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    create = Folder.create
    monkeypatch.setattr(Folder, "create", lambda self, name: (names.append(name), create(self, name))[1])
    make_index(tmp_path, quarters(np.random.default_rng(0), 20, 4), 3)
    assert names == ["part-00000.parquet", *(f"shard-{i:04d}.faiss" for i in range(3)), "index.json", "manifest.json"]


def test_ray_tasks_write_the_same_files(cluster: None, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    here = make_index(tmp_path, vectors, 3, "IVF4,Flat", group=50)
    source, out = Source.of(Folder.at(tmp_path) / "table"), Folder.at(tmp_path) / "ray"
    config = IndexConfig(factory="IVF4,Flat", shards=3, nprobe=16)
    build(config, source, Column("vector", 8), out, queries=vectors[:0], words=False, seed=0, workers=Workers(2, 1, 0))
    assert out.read_json("index.json") == here.read_json("index.json")  # checksums are among it


def test_recall_by_hand() -> None:
    exact = np.array([[1, 2, 3, -1], [5, 6, 7, 8]])
    found = np.array([[3, 9, 1, -1], [8, 7, 6, 5]])
    assert recall(found, exact) == 6 / 7  # -1 is no neighbour, on either side


def test_recall_is_that_of_the_whole_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(900, 8)).astype(np.float32), rng.normal(size=(30, 8)).astype(np.float32)
    card = make_index(tmp_path / "one", vectors, 3, "IVF16,Flat", nprobe=1, queries=queries).read_json("index.json")
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    from retrikt_ray.index.search import Searcher

    found = Searcher.open(Folder.at(tmp_path / "one" / "index-3")).search(queries, 10)[0]
    want = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)])
    assert card["recall"] == {"at": 10, "value": round(float(want), 4), "queries": 30} and 0.1 < want < 0.9
    # Left to itself, the build takes as many probes as are worth it: here, with 16 lists, all of them.
    auto = make_index(tmp_path / "auto", vectors, 3, "IVF16,Flat", nprobe=0, queries=queries).read_json("index.json")
    assert auto["nprobe"] == 16 and auto["recall"]["value"] == 1.0
    assert make_index(tmp_path / "flat", vectors, 2, queries=queries).read_json("index.json")["recall"] is None  # exact: nothing to measure


@pytest.mark.parametrize("factory", ["Nonsense", "IVF64,Flat", "IVF1,Flat,RFlat"])
def test_a_factory_that_faiss_refuses(factory: str) -> None:
    with pytest.raises(ConfigError, match=rf"index\.factory: FAISS refuses '{factory}' for 3 rows of 2 dimensions: \w"):
        train(factory, 2, [np.zeros((3, 2), np.float32)], 1)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_lists() -> None:
    assert [lists(n) for n in (10_000, 200_001, 1_000_000, 4_000_000)] == [512, 2048, 4096, 8192]  # nearest to 400, 1789, 4000, 8000


@pytest.mark.parametrize(
    ("rows", "width", "memory_gb", "latency_ms", "factory"),
    [
        (3_000, 92, 4.0, 10.0, "Flat"),
        (9_000, 92, 4.0, 1e-6, "Flat"),  # too few rows for anything else
        (1_000_000, 128, 4.0, 100.0, "Flat"),
        (1_000_000, 128, 4.0, 10.0, "IVF4096,Flat"),
        (1_000_000, 128, 0.2, 10.0, "IVF4096,SQ8"),  # 136 MB; whole vectors take 512
        (1_000_000, 128, 0.1, 10.0, "OPQ32,IVF4096,PQ32"),  # 40 MB
        (1_000_000, 130, 0.1, 10.0, "OPQ32_128,IVF4096,PQ32"),  # not divisible by four
        (20_000_000, 128, 20.0, 0.5, "HNSW32,Flat"),  # lists of so many rows take longer
    ],
)
def test_choose(rows: int, width: int, memory_gb: float, latency_ms: float, factory: str) -> None:
    found, why = choose(rows, width, memory_gb, latency_ms)
    assert found == factory
    assert why.startswith(factory) and "\n" not in why


def test_why_is_honest() -> None:
    assert choose(1_000_000, 128, 0.2, 10.0)[1] == (
        "IVF4096,SQ8: inverted lists, one byte a dimension, 136.0 MB, about 0.41 ms a query; Flat too large, IVF4096,Flat too large, "
        "HNSW32,Flat too large"
    )
    assert "over the target of 0.001 ms, but nothing that fits 4 GB is quicker" in choose(1_000_000, 128, 4.0, 0.001)[1]
    with pytest.raises(ConfigError, match=r"index\.memory_gb=0\.001: 1,000,000 rows of 128 dimensions need at least 40\.0 MB \(OPQ32"):
        choose(1_000_000, 128, 0.001, 10.0)


def test_every_candidate_is_a_factory_that_faiss_knows() -> None:
    rng = np.random.default_rng(0)
    for width in (8, 21):
        sample = rng.normal(size=(1500, width)).astype(np.float32)
        for kind in candidates(10_000, width):
            assert train(kind.factory, width, [sample], 2)
