"""Rows that students train on: a store read as the training goes gives what one in memory gives; and which rows are held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source
from retrikt_ray.store.rows import store_schema
from retrikt_ray.student import rows as reading
from retrikt_ray.student.rows import (
    Batches,
    Rows,
    StoreRows,
    among,
    balanced,
    courses,
    drawn,
    joined_rows,
    load_rows,
    load_store,
    load_validation,
    sources_of,
)

COUNT, GROUP = 45, 4


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    """45 rows in two files of row groups of four; every third is the task's."""
    folder = Folder.at(tmp_path / "store")
    rows = [
        {
            "id": str(i),
            "text": f"text {i}",
            "text_pair": f"pair {i}" if i % 2 else None,
            "value": float(i % 2) if i % 3 == 0 else None,
            "teacher_probs": [i / 100, 1 - i / 100],
            "teacher_embedding": [float(i), -float(i)],
            "source": "task" if i % 3 == 0 else "generated" if i % 3 == 1 else "unlabelled",
        }
        for i in range(COUNT)
    ]
    for part, (low, high) in enumerate(((0, 18), (18, COUNT))):
        with folder.create(f"part-{part:05d}.parquet") as path:
            pq.write_table(pa.Table.from_pylist(rows[low:high], schema=store_schema(2)), path, row_group_size=GROUP)
    return folder


def same(one: Rows, other: Rows) -> None:
    assert one.texts == other.texts
    assert one.embeddings is not None and other.embeddings is not None
    for a, b in ((one.teacher, other.teacher), (one.embeddings, other.embeddings), (one.truth, other.truth)):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a.numpy(), b.numpy())  # NaN where there is no true label


# rows


def test_rows_of_a_store(store: Folder) -> None:
    rows = load_rows(store)
    assert len(rows) == COUNT and rows.texts[:2] == [("text 0", None), ("text 1", "pair 1")]
    assert rows.teacher[7].tolist() == pytest.approx([0.07, 0.93]) and rows.teacher.dtype == torch.float32
    assert rows.embeddings is not None and rows.embeddings[7].tolist() == [7, -7]
    assert rows.truth[[0, 3]].tolist() == [0, 1] and math.isnan(rows.truth[1])
    some = rows.take([5, 2, 5])
    assert [t for t, _ in some.texts] == ["text 5", "text 2", "text 5"] and some.teacher[:, 0].tolist() == pytest.approx([0.05, 0.02, 0.05])


def test_joined_rows(store: Folder) -> None:
    rows = load_rows(store)
    same(joined_rows([rows.take([3]), rows.take([]), rows.take([1, 2])]), rows.take([3, 1, 2]))
    plain = Rows([("a", None)], torch.ones(1, 2), None, torch.ones(1))
    both = joined_rows([plain, rows.take([4])])
    assert both.embeddings is None and both.texts == [("a", None), ("text 4", None)] and both.truth[0] == 1 and len(both.teacher) == 2


def test_validation_rows_have_their_true_labels(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "text_pair": pa.array([None, None], pa.string()), "value": [1.0, 0.0]})
    Folder.at(tmp_path).write_table("validation.parquet", table)
    rows = load_validation(Folder.at(tmp_path), 3)
    assert rows.teacher.tolist() == [[0, 1, 0], [1, 0, 0]] and rows.truth.tolist() == [1, 0] and rows.embeddings is None
    assert load_validation(Folder.at(tmp_path), 1).teacher.tolist() == [[1], [0]]


# streaming


@pytest.mark.parametrize("window", [1, 3, 64])
def test_rows_read_as_they_are_asked_for_are_those_in_memory(store: Folder, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(reading, "WINDOW", window)
    rng = np.random.default_rng(window)
    positions = np.sort(rng.choice(COUNT, 30, replace=False))
    whole, streamed = load_rows(store).take(positions.tolist()), StoreRows(store, positions)
    assert len(streamed) == 30
    for size in (1, 2, 30, 7, 0):
        index = rng.integers(0, 30, size).tolist()  # in any order, some twice
        same(streamed.take(index), whole.take(index))
        assert len(streamed.kept) <= window


def test_groups_are_the_row_groups_that_have_rows(store: Folder) -> None:
    rows = StoreRows(store, np.array([1, 3, 4, 17, 18, 40]))  # groups begin at 0, 4, 8, 12, 16 | 18, 22, ...
    assert [g.tolist() for g in rows.groups] == [[0, 1], [2], [3], [4], [5]]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of the row groups that are read."""
    firsts: list[int] = []
    before = Source.read

    def watched(self: Source, low: int, high: int, columns: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
        firsts.append(low)
        return before(self, low, high, columns)

    monkeypatch.setattr(Source, "read", watched)
    return firsts


def test_an_epoch_reads_each_group_once(store: Folder, monkeypatch: pytest.MonkeyPatch, read: list[int]) -> None:
    monkeypatch.setattr(reading, "WINDOW", 3)
    rows = StoreRows(store, np.arange(16))
    batches = rows.batches(4, 2, 0)
    for step in range(4):  # three groups, shuffled together, then the fourth
        rows.take(batches[step])
    assert sorted(read) == [0, 4, 8, 12]


def test_what_was_used_last_stays(store: Folder, monkeypatch: pytest.MonkeyPatch, read: list[int]) -> None:
    monkeypatch.setattr(reading, "WINDOW", 2)
    rows = StoreRows(store, np.arange(COUNT))
    for position in (0, 4, 1, 8, 2, 5):  # groups 0, 1, 0, 2 (in the place of 1), 0, 1
        rows.take([position])
    assert read == [0, 4, 8, 4]


# batches


def groups(*sizes: int) -> list[np.ndarray]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("window", [1, 2, 64])
@pytest.mark.parametrize("batch", [1, 4, 5, 100])
def test_every_row_comes_once_an_epoch(batch: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", window)
    batches = Batches(groups(4, 1, 7, 3, 2), batch, 3, 0)
    steps = -(-17 // batch)
    assert len(batches) == 3 * steps
    epochs = [[row for step in range(steps) for row in batches[epoch * steps + step]] for epoch in range(3)]
    assert all(sorted(rows) == list(range(17)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(17))
    assert all(len(batches[i]) == batch for i in range(len(batches)) if (i + 1) % steps)


def test_batches_are_a_function_of_seed_and_step() -> None:
    """Whatever was asked before: a resumed training begins in the middle."""
    parts = groups(5, 5, 5)
    first, other, longer = Batches(parts, 4, 3, 7), Batches(parts, 4, 3, 8), Batches(parts, 4, 9, 7)
    found = [first[i] for i in range(12)]
    assert [first[i] for i in reversed(range(12))] == found[::-1]
    assert Batches(parts, 4, 3, 7)[9] == found[9]
    assert [longer[i] for i in range(12)] == found  # more epochs change nothing before them
    assert [other[i] for i in range(12)] != found


def test_only_groups_of_a_window_are_shuffled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", 2)
    batches = Batches(groups(*[4] * 6), 8, 4, 0)
    drawn_pairs = [{row // 4 for row in batches[i]} for i in range(12)]
    assert all(len(pair) == 2 for pair in drawn_pairs)
    assert len({frozenset(p) for p in drawn_pairs}) > 6  # other neighbours in another epoch
    monkeypatch.setattr(reading, "WINDOW", 64)
    assert any(len({row // 4 for row in Batches(groups(*[4] * 6), 8, 1, 0)[i]}) > 2 for i in range(3))  # a plain shuffle


def test_a_batch_is_dealt_out_one_row_after_another_while_all_fit() -> None:
    batches = Batches(groups(5, 5, 5), 7, 1, 0)
    assert batches.parts(0, 3) == [batches[0][rank::3] for rank in range(3)]
    assert batches.parts(2, 4) == [batches[2], [], [], []] and len(batches[2]) == 1


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_have_groups_of_their_own_when_there_are_many(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", 4)
    sizes = [3, 1, 4, 2, 5, 3, 2, 4, 3]
    group_of = np.repeat(np.arange(9), sizes)
    batches, owners = Batches(groups(*sizes), 5, 2, 0), [set(), set()]
    for step in range(len(batches)):
        parts = batches.parts(step, workers)
        assert len(parts) == workers and sorted(row for part in parts for row in part) == sorted(batches[step])
        assert all([row for row in batches[step] if row in part] == part for part in parts)  # in the order of the batch
        owners[step // batches.per_epoch] |= {(int(group_of[row]), rank) for rank, part in enumerate(parts) for row in part}
    for found in owners:
        assert sorted(group for group, _ in found) == list(range(9))  # each has one owner in an epoch
        counts = np.bincount([rank for _, rank in found], minlength=workers)
        assert counts.max() - counts.min() <= 1


def test_workers_read_a_store_once_between_them(store: Folder, monkeypatch: pytest.MonkeyPatch, read: list[int]) -> None:
    monkeypatch.setattr(reading, "WINDOW", 3)
    team = [StoreRows(store, np.arange(COUNT)) for _ in range(2)]
    batches = team[0].batches(6, 1, 0)
    for step in range(len(batches)):
        for rows, part in zip(team, batches.parts(step, 2), strict=True):
            rows.take(part)
    assert sorted(set(read)) == [*range(0, 18, 4), *range(18, COUNT, 4)]
    assert len(read) <= 12 + 2  # a worker without rows in a batch looks at the columns of the first group, once


# held-out rows


def test_held_out_rows_are_never_the_tasks(store: Folder) -> None:
    for seed in range(20):
        held = drawn(sources_of(store), seed)
        assert len(held) == 3 and (held % 3 != 0).all()  # a tenth of 30
        assert held.tolist() == sorted({*held.tolist()}) == drawn(sources_of(store), seed).tolist()
    assert len({tuple(drawn(sources_of(store), seed)) for seed in range(20)}) > 10


def test_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_HELD", 25)
    assert [len(drawn(np.array(["generated"] * n, str), 0)) for n in (0, 9, 10, 199, 1000)] == [0, 0, 1, 19, 25]


def test_texts_of_the_domain_are_held_out_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ENOUGH", 20)
    sources = np.array(["task", "generated", "unlabelled"] * 20)
    assert {*sources[drawn(sources, 0)]} == {"unlabelled"} and len(drawn(sources, 0)) == 2
    few = [drawn(sources[:57], seed) for seed in range(20)]  # 19 unlabelled ones
    assert {s for held in few for s in sources[held]} == {"generated", "unlabelled"} and {len(held) for held in few} == {3}
    assert {*sources[:60:3][drawn(sources[:60:3], 0)]} == set()


def test_a_store_is_cut_into_rows_to_train_on_and_rows_held_out(store: Folder) -> None:
    rows, held = load_store(store, 3)
    positions = drawn(sources_of(store), 3)
    same(held, load_rows(store).take(positions.tolist()))
    assert {*rows.positions.tolist()} == set(range(COUNT)) - set(positions.tolist()) and len(rows) == COUNT - 3


def test_a_store_is_cut_into_the_rows_of_some_sources(store: Folder) -> None:
    rows, held = load_store(store, 3, ("task", "unlabelled"))
    every, same_held = load_store(store, 3)
    wanted = np.isin(sources_of(store), ("task", "unlabelled"))
    assert {*rows.positions.tolist()} == {p for p in every.positions.tolist() if wanted[p]} and 0 < len(rows) < len(every)
    same(held, same_held)


def test_the_domains_own_rows_are_tried_alone_where_there_are_enough_and_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ENOUGH", 3)
    own = ("task", "unlabelled")
    for sources, want in (
        (["task", "generated", *["unlabelled"] * 3], [(), own]),
        (["task", "corpus", *["unlabelled"] * 3], [(), own]),
        (["task", "generated", *["unlabelled"] * 2], [()]),
        (["task", *["unlabelled"] * 3], [()]),
        (["task", "generated"], [()]),
    ):
        assert courses(np.array(sources)) == want
    assert among(np.array(["task", "generated", "unlabelled"]), own).tolist() == [True, False, True]
    assert among(np.array(["task", "generated"]), ()).all()


def test_a_store_of_task_rows_alone_holds_none_out(tmp_path: Path) -> None:
    row = {"id": "1", "text": "a", "value": 1.0, "teacher_probs": [0.5, 0.5], "teacher_embedding": [0.0, 1.0], "source": "task"}
    folder = Folder.at(tmp_path)
    folder.write_table("part-00000.parquet", pa.Table.from_pylist([row] * 30, schema=store_schema(2)))
    rows, held = load_store(folder, 0)
    assert len(rows) == 30 and len(held) == 0 and held.teacher.shape == (0, 2)


# which rows count how often


@pytest.mark.parametrize(
    ("own", "other", "times"),
    [
        (10, 10, 1),  # half already
        (10, 14, 1),  # as near to half as whole repeats come
        (10, 16, 2),
        (10, 40, 4),
        (10, 900, 8),  # MOST_TIMES
        (0, 5, 1),
        (5, 0, 1),
    ],
)
def test_texts_of_the_domain_are_half_of_all(own: int, other: int, times: int) -> None:
    sources = np.array((["task", "unlabelled"] * own)[:own] + ["generated"] * other)
    rows = np.arange(len(sources))
    found = balanced(rows, sources)
    assert (np.diff(found) >= 0).all()
    counts = np.bincount(found, minlength=len(rows))
    assert counts[:own].tolist() == [times] * own and counts[own:].tolist() == [1] * other


def test_balancing_looks_at_the_rows_that_are_trained_on(store: Folder) -> None:
    sources = sources_of(store)
    some = np.array([0, 1, 4, 7, 10, 5])  # a task row, four generated ones, an unlabelled one
    assert balanced(some, sources).tolist() == [0, 0, 1, 4, 5, 5, 7, 10]
    rows = StoreRows(store, balanced(some, sources))
    assert len(rows) == 8 and rows.distinct == 6 and rows.take(list(range(8))).distinct == 6
