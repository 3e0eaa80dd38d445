"""N shards answer as one index, whatever the sizes; and damaged shards are refused. The shards are built as the index stage builds them."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from making.vectors import make_index, quarters, seal

from retrikt_ray.index import search
from retrikt_ray.index.search import Searcher, merge
from retrikt_ray.index.spread import Gone, MissingShards, Pending, Spread
from retrikt_ray.runtime.folders import ArtifactError, Folder

NONE = -np.inf
SHARDS = (1, 2, 3, 7, 16)


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


def exact(vectors: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and similarities of the k best rows by plain sorting: by falling similarity, ties by id."""
    ids, similarities = [], []
    rows = [i for i in range(len(vectors)) if allowed is None or allowed[i]]
    for query in queries.tolist():
        products = [sum(a * b for a, b in zip(row, query, strict=True)) for row in vectors.tolist()]
        best = sorted(rows, key=lambda i: (-products[i], i))[:k]
        ids.append(best + [-1] * (k - len(best)))
        similarities.append([products[i] for i in best] + [NONE] * (k - len(best)))
    return ids, similarities


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 9), st.sampled_from(SHARDS), st.integers(1, 45), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1)
)
@example(rows=40, dim=1, shards=1, k=7, copies=3, seed=0)
@example(rows=40, dim=2, shards=3, k=3, copies=8, seed=1)
@example(rows=3, dim=2, shards=16, k=45, copies=1, seed=2)  # most shards are empty
def test_shards_answer_as_one_exact_search(
    tmp_path_factory: pytest.TempPathFactory, rows: int, dim: int, shards: int, k: int, copies: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = np.tile(quarters(rng, -(-rows // copies), dim), (copies, 1))[:rows]  # copies: every row occurs more than once
    queries, allowed = quarters(rng, 3, dim), rng.random(rows) < 0.6
    root = tmp_path_factory.mktemp("index")
    searcher = Searcher.open(make_index(root, vectors, shards))
    for mask in (None, allowed):
        ids, similarities = searcher.search(queries, k, mask)
        want_ids, want_similarities = exact(vectors, queries, k, mask)
        np.testing.assert_array_equal(similarities, np.array(want_similarities, dtype=np.float32))
        assert ids.tolist() == want_ids
    shutil.rmtree(root)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    factory=st.sampled_from(["Flat", "IVF4,Flat"]),
    rows=st.one_of(st.integers(4, 3000), st.just(20_011)),  # FAISS multiplies matrices where there is enough to multiply
    dim=st.sampled_from([1, 2, 7, 16, 33, 128, 200]),
    batch=st.sampled_from([1, 19, 64]),
    k=st.sampled_from([1, 8, 100, 3001]),
    copies=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 2**32 - 1),
)
@example(factory="Flat", rows=20_011, dim=128, batch=64, k=100, copies=2, seed=0)
@example(factory="IVF4,Flat", rows=2999, dim=128, batch=64, k=100, copies=2, seed=0)
def test_any_number_of_shards_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, factory: str, rows: int, dim: int, batch: int, k: int, copies: int, seed: int
) -> None:
    """Random real numbers, where FAISS's rounding depends on sizes, batch and threads: ids and similarities are equal all the same."""
    rng = np.random.default_rng(seed)
    vectors = np.tile(rng.normal(size=(-(-rows // copies), dim)), (copies, 1))[:rows].astype(np.float32)
    queries = np.concatenate([vectors[: batch // 2], rng.normal(size=(batch, dim)).astype(np.float32)])[:batch]
    allowed = rng.random(rows) < 0.7
    root = tmp_path_factory.mktemp("index")
    folders = {n: make_index(root, vectors, n, factory, nprobe=2, group=2570) for n in SHARDS}
    found = [Searcher.open(folder, threads=1 + n % 2) for n, folder in folders.items()]
    if factory != "Flat":  # lists joined in memory, and shard by shard
        assert [len(s.shards) for s in found] == [1] * len(SHARDS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "JOINED_BYTES", 0)
            found += [Searcher.open(folder, threads=1 + n % 2) for n, folder in folders.items()]
    assert [len(s.shards) for s in found[-len(SHARDS) :]] == list(SHARDS)
    for mask in (None, allowed):
        ids, similarities = found[0].search(queries, k, mask)
        for searcher in found[1:]:
            more_ids, more_similarities = searcher.search(queries, k, mask)
            np.testing.assert_array_equal(more_ids, ids)
            np.testing.assert_array_equal(more_similarities, similarities)
        if mask is not None:
            assert mask[ids[ids >= 0]].all()
    for i in (0, batch - 1):  # nor does an answer depend on what was asked beside it
        if factory == "Flat":
            alone = found[0].search(queries[i : i + 1], k)
            np.testing.assert_array_equal(alone[0][0], found[-1].search(queries, k)[0][i])
            np.testing.assert_array_equal(alone[1][0], found[-1].search(queries, k)[1][i])
    shutil.rmtree(root)


def test_ties_at_the_last_place_go_to_the_smaller_id(tmp_path: Path) -> None:
    # Similarities to (1): 0.5 twenty times, then 1. The two best are the last row and row 0, in one shard as in three.
    vectors = np.array([[0.5]] * 20 + [[1.0]], dtype=np.float32)
    for shards in (1, 3):
        found, _ = Searcher.open(make_index(tmp_path / str(shards), vectors, shards)).search(np.ones((1, 1), np.float32), 2)
        assert found.tolist() == [[20, 0]]


@pytest.mark.parametrize("factory", ["IVF8,Flat", "OPQ2,IVF8,Flat", "IVF8,SQ8", "OPQ3,IVF8,PQ3x4", "HNSW8,Flat", "SQ8", "PCA4,Flat"])
def test_every_kind_is_built_searched_and_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(700, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    one = Searcher.open(make_index(tmp_path, vectors, 1, factory, nprobe=8, group=90))
    monkeypatch.setattr(search, "JOINED_BYTES", 0)
    four = Searcher.open(make_index(tmp_path, vectors, 4, factory, nprobe=8, group=90))
    ids, similarities = four.search(vectors[:50], 10)
    if not factory.startswith("HNSW"):  # a graph over a part is not a part of the graph
        want_ids, want_similarities = one.search(vectors[:50], 10)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(similarities, want_similarities, rtol=0, atol=1e-6)
    truth = np.argsort(-(vectors[:50] @ vectors.T), axis=1)[:, :10]
    hit = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), truth.tolist(), strict=True)])
    assert hit > (0.3 if "PQ3" in factory or "PCA" in factory else 0.9)
    even = np.arange(700) % 2 == 0
    filtered, _ = four.search(vectors[:50], 10, even)
    assert (filtered >= 0).all() and (filtered % 2 == 0).all()


def test_lists_of_another_layout_are_not_joined(tmp_path: Path) -> None:
    """FAISS corrupts its memory when it merges the lists of a fast-scan index."""
    vectors = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    searcher = Searcher.open(make_index(tmp_path, vectors, 3, "IVF16,PQ4x4fs", group=500))
    assert len(searcher.shards) == 3
    assert (searcher.search(vectors[:40], 10)[0][:, 0] >= 0).all()


@pytest.mark.parametrize("factory", ["IVF64,Flat", "HNSW8,Flat"])
def test_what_is_rare_is_found_in_lists_that_are_not_probed(tmp_path: Path, factory: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3000, 8)).astype(np.float32)
    rare = np.zeros(3000, bool)
    rare[rng.choice(3000, 15, replace=False)] = True
    truth = np.flatnonzero(rare)[np.argsort(-(vectors[:20] @ vectors[rare].T), axis=1)[:, :10]]
    for shards in (1, 3):
        found = Searcher.open(make_index(tmp_path, vectors, shards, factory, nprobe=2, group=500)).search(vectors[:20], 10, rare)[0]
        np.testing.assert_array_equal(found, truth)


def test_nprobe_is_heeded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 6)).astype(np.float32)
    truth = np.argsort(-(vectors[:50] @ vectors.T), axis=1)[:, :10]
    some, every = (
        Searcher.open(make_index(tmp_path / str(n), vectors, 4, "IVF8,Flat", nprobe=n)).search(vectors[:50], 10)[0] for n in (2, 8)
    )
    np.testing.assert_array_equal(every, truth)
    assert (some != truth).any()


class Holder:
    """The shards `files` of an index, in a thread; asked, it answers when `may` is set, and ends instead as often as `losses` says."""

    def __init__(self, folder: Folder, files: list[str]) -> None:
        self.searcher, self.may, self.losses = Searcher.open(folder, only=files), threading.Event(), 0
        self.may.set()
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, *question: Any) -> Pending:
        def answer() -> Any:
            assert self.may.wait(20)
            if self.losses:
                self.losses -= 1
                raise Gone
            return self.searcher.once(*question)

        future = self.pool.submit(answer)

        class Asked:
            def result(self, timeout_s: float) -> Any:
                return future.result(timeout_s)

        return Asked()


def holders(folder: Folder, groups: int) -> list[Holder]:
    files = [shard["file"] for shard in folder.read_json("index.json")["shards"]]
    return [Holder(folder, part.tolist()) for part in np.array_split(files, groups)]


def test_shards_that_others_hold_answer_as_this_process(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 12)).astype(np.float32)
    allowed = rng.random(500) < 0.5
    rare = np.arange(500) % 60 == 0  # too few in the lists that are probed
    folder = make_index(tmp_path, vectors, 5, "IVF4,Flat", nprobe=2)
    here, three = Searcher.open(folder), holders(folder, 3)
    spread = Spread(three, 12, 500, deadline_s=20)
    for mask in (None, allowed, rare):
        for got, want in zip(spread.search(vectors[:9], 20, mask), here.search(vectors[:9], 20, mask), strict=True):
            np.testing.assert_array_equal(got, want)
    three[1].losses = 2  # then it is there again
    np.testing.assert_array_equal(spread.search(vectors[:9], 20)[0], here.search(vectors[:9], 20)[0])
    assert (three[1].losses, spread.missing) == (0, 0)
    with pytest.raises(ValueError, match=r"queries have shape \(1, 4\); the index expects \(Q, 12\)"):
        spread.search(np.zeros((1, 4), np.float32), 1)
    with pytest.raises(ValueError, match="k is 0; expected 1 or more"):
        spread.search(vectors[:1], 0)


@pytest.mark.parametrize("lost", [False, True])
def test_shards_that_are_late_or_lost_are_missed_as_it_was_asked(tmp_path: Path, lost: bool) -> None:
    vectors = np.random.default_rng(0).normal(size=(90, 12)).astype(np.float32)
    folder = make_index(tmp_path, vectors, 3, "Flat")
    here, three = Searcher.open(folder), holders(folder, 3)
    spread = Spread(three, 12, 90, deadline_s=0.5)
    if lost:
        three[1].losses = 10**6
    else:
        three[1].may.clear()
    with pytest.raises(MissingShards, match=r"1 of 3 groups of shards have not answered in 0\.5 s"):
        spread.search(vectors[:4], 5)
    spread.partial = True
    began = time.monotonic()
    others = np.arange(90) // 30 != 1
    for got, want in zip(spread.search(vectors[:4], 5), here.search(vectors[:4], 5, others), strict=True):
        np.testing.assert_array_equal(got, want)
    assert spread.missing == 1
    assert lost or time.monotonic() - began < 0.4  # nobody waits again for one that is late
    three[1].losses = 0
    three[1].may.set()
    three[1].pool.submit(int).result(20)  # behind what it was asked
    np.testing.assert_array_equal(spread.search(vectors[:4], 5)[0], here.search(vectors[:4], 5)[0])
    assert spread.missing == 0


def test_a_query_of_another_width_is_refused(tmp_path: Path) -> None:
    searcher = Searcher.open(make_index(tmp_path, np.eye(3, dtype=np.float32), 2))
    with pytest.raises(ValueError, match=r"queries have shape \(1, 4\); the index expects \(Q, 3\)"):
        searcher.search(np.zeros((1, 4), np.float32), 1)
    with pytest.raises(ValueError, match="k is 0; expected 1 or more"):
        searcher.search(np.zeros((1, 3), np.float32), 0)


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = make_index(tmp_path, quarters(np.random.default_rng(0), 20, 4), 3)
    Searcher.open(folder)
    shard = tmp_path / "index-3" / "shard-0001.faiss"
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


@pytest.mark.parametrize(("key", "value"), [("high", 9), ("width", 5)])
def test_a_shard_of_another_index_is_refused_by_name(tmp_path: Path, key: str, value: int) -> None:
    """Sealed and whole, but not what index.json says."""
    folder = make_index(tmp_path, quarters(np.random.default_rng(0), 20, 4), 2)
    card = folder.read_json("index.json")
    if key == "high":
        card["shards"][0]["high"] = value
    else:
        card["width"] = value
    folder.write_json("index.json", card)
    seal(folder)
    with pytest.raises(ArtifactError, match=r"shard-0000\.faiss holds 10 vectors of 4"):
        Searcher.open(folder)
