"""N shards answer as one index. Vectors have entries in quarters, so that every product is exact and a tie is a tie."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retrikt_ray import artifacts
from retrikt_ray.folders import ArtifactError, Folder
from retrikt_ray.index import build_shard, choose_factory, train_index
from retrikt_ray.search import Searcher, merge
from retrikt_ray.settings import ConfigError

NONE = -np.inf


def test_merge_by_hand() -> None:
    ids = [np.array([[4, 0], [1, -1]]), np.array([[7, 2, 5], [3, 6, -1]])]
    similarities = [np.array([[0.9, 0.5], [0.1, 3.0]]), np.array([[0.9, 0.6, 0.5], [0.2, -0.4, 3.0]])]
    found, best = merge(ids, similarities, 4)
    assert found.tolist() == [[4, 7, 2, 0], [3, 1, 6, -1]]  # ties by id; a -1 is no row, whatever its similarity
    np.testing.assert_array_equal(best, np.array([[0.9, 0.9, 0.6, 0.5], [0.2, 0.1, -0.4, NONE]], dtype=np.float32))


def test_merge_pads_to_k() -> None:
    found, best = merge([np.array([[2]]), np.array([[1]])], [np.array([[0.5]]), np.array([[0.75]])], 4)
    assert found.tolist() == [[1, 2, -1, -1]] and best.tolist() == [[0.75, 0.5, NONE, NONE]]
    assert best.dtype == np.float32


def make_index(root: Path, vectors: np.ndarray, shards: int, factory: str = "Flat", nprobe: int = 16, part_rows: int = 11) -> Folder:
    """A sealed index over parts of `part_rows` rows, built as the stage does it."""
    run = Folder.at(root)
    scratch, folder = run / "scratch", run / "index"
    parts = []
    for first in range(0, len(vectors), part_rows):
        part = vectors[first : first + part_rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1])
        parts.append((f"part-{first:05d}.parquet", first))
        scratch.write_table(parts[-1][0], pa.table({"vector": column}))
    trained = train_index(factory, vectors, nprobe)
    edges = np.linspace(0, len(vectors), shards + 1).astype(int)
    cards = [build_shard(trained, scratch, parts, int(edges[i]), int(edges[i + 1]), folder, f"shard-{i:04d}.faiss") for i in range(shards)]
    assert [c["rows"] for c in cards] == np.diff(edges).tolist()
    card = {"factory": factory, "width": vectors.shape[1], "rows": len(vectors), "metric": "cosine", "shards": cards}
    folder.write_json("index.json", card)
    artifacts.seal(folder, stage="index", fingerprint="x", config={}, inputs={}, seed=0, started=time.time())
    return folder


def exact(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and similarities of the k best rows by plain sorting: by falling similarity, ties by id."""
    ids, similarities = [], []
    for query in queries.tolist():
        products = [sum(a * b for a, b in zip(row, query, strict=True)) for row in vectors.tolist()]
        best = sorted(range(len(products)), key=lambda i: (-products[i], i))[:k]
        ids.append(best + [-1] * (k - len(best)))
        similarities.append([products[i] for i in best] + [NONE] * (k - len(best)))
    return ids, similarities


def quarters(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    return rng.integers(-4, 5, (rows, dim)).astype(np.float32) / 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 45), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
@example(rows=40, dim=1, shards=1, k=7, copies=3, seed=0)
@example(rows=40, dim=2, shards=3, k=3, copies=8, seed=1)
@example(rows=3, dim=2, shards=3, k=45, copies=1, seed=2)
def test_shards_answer_as_one_exact_search(
    tmp_path_factory: pytest.TempPathFactory, rows: int, dim: int, shards: int, k: int, copies: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = np.tile(quarters(rng, -(-rows // copies), dim), (copies, 1))[:rows]  # copies: every row occurs more than once
    queries = quarters(rng, 3, dim)
    root = tmp_path_factory.mktemp("index")
    searcher = Searcher.open(make_index(root, vectors, min(shards, rows)))
    ids, similarities = searcher.search(queries, k)
    shutil.rmtree(root)
    want_ids, want_similarities = exact(vectors, queries, k)
    np.testing.assert_array_equal(similarities, np.array(want_similarities, dtype=np.float32))
    assert ids.tolist() == want_ids
    assert searcher.rows == rows


def test_ties_at_the_last_place_go_to_the_smaller_id(tmp_path: Path) -> None:
    # Similarities to (1): 0.5, 0.5, 1. The two best are rows 2 and 0, in one shard as in three.
    vectors = np.array([[0.5], [0.5], [1.0]], dtype=np.float32)
    for shards in (1, 3):
        found, _ = Searcher.open(make_index(tmp_path / str(shards), vectors, shards)).search(np.ones((1, 1), np.float32), 2)
        assert found.tolist() == [[2, 0]]


def test_ivf_shards_share_one_quantizer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    one, four = (Searcher.open(make_index(tmp_path / str(n), vectors, n, "IVF8,Flat", nprobe=2, part_rows=90)) for n in (1, 4))
    ids, similarities = four.search(vectors[:50], 10)
    want_ids, want_similarities = one.search(vectors[:50], 10)
    assert ids.tolist() == want_ids.tolist()
    np.testing.assert_allclose(similarities, want_similarities, rtol=0, atol=1e-6)
    assert ids[:, 0].tolist() == list(range(50))  # every row finds itself
    everything = Searcher.open(make_index(tmp_path / "all", vectors, 4, "IVF8,Flat", nprobe=8, part_rows=90)).search(vectors[:50], 10)[0]
    np.testing.assert_array_equal(everything, np.argsort(-(vectors[:50] @ vectors.T), axis=1)[:, :10])
    assert (ids != everything).any()  # two of eight lists miss something: nprobe is heeded


def test_a_query_of_another_width_is_refused(tmp_path: Path) -> None:
    searcher = Searcher.open(make_index(tmp_path, np.eye(3, dtype=np.float32), 2))
    with pytest.raises(ValueError, match=r"queries have shape \(1, 4\); the index expects \(Q, 3\)"):
        searcher.search(np.zeros((1, 4), np.float32), 1)


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = make_index(tmp_path, quarters(np.random.default_rng(0), 20, 4), 3)
    Searcher.open(folder)
    shard = tmp_path / "index" / "shard-0001.faiss"
    data = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(data[:-1])
    else:  # one bit of one vector: FAISS itself would not notice
        shard.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    words = {"missing": "is missing", "cut": "truncated", "altered": "was altered"}
    with pytest.raises(ArtifactError, match=rf"shard-0001\.faiss.*{words[damage]}"):
        Searcher.open(folder)


@pytest.mark.parametrize(("key", "value"), [("rows", 9), ("width", 5)])
def test_a_shard_of_another_index_is_refused_by_name(tmp_path: Path, key: str, value: int) -> None:
    """Sealed and whole, but not what index.json says."""
    folder = make_index(tmp_path, quarters(np.random.default_rng(0), 20, 4), 2)
    card = folder.read_json("index.json")
    if key == "rows":
        card["shards"][1]["rows"] = value
    else:
        card["width"] = value
    folder.remove(artifacts.MANIFEST)
    folder.write_json("index.json", card)
    artifacts.seal(folder, stage="index", fingerprint="x", config={}, inputs={}, seed=0, started=time.time())
    name = "shard-0001.faiss holds 10 vectors of 4" if key == "rows" else "shard-0000.faiss holds 10 vectors of 4"
    with pytest.raises(ArtifactError, match=name):
        Searcher.open(folder)


def test_choose_factory() -> None:
    assert choose_factory(200_000) == "Flat"
    assert choose_factory(200_001) == "IVF2048,Flat"  # 4 sqrt(200001) = 1789, nearest power of two by exponent: 2^11
    assert choose_factory(4_000_000) == "IVF8192,Flat"  # 8000


@pytest.mark.parametrize("factory", ["Nonsense", "IVF64,Flat"])
def test_a_factory_that_faiss_refuses(factory: str) -> None:
    with pytest.raises(ConfigError, match=rf"index\.factory: FAISS refuses '{factory}' for 3 rows of 2 dimensions"):
        train_index(factory, np.zeros((3, 2), np.float32), 1)
