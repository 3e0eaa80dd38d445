"""Generation: seeds by row, shards, and the seal on exactly once. The texts themselves: `test_engines.py` and the pipeline's tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from retrikt_ray.runtime.cluster import Workers
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.runtime.tables import Source
from retrikt_ray.store import generate as stage
from retrikt_ray.store.engines import ENGINES, Generated, Order
from retrikt_ray.store.generate import (
    GenerateConfig,
    ShardWriter,
    generate,
    handed,
    join,
    row_id,
    row_seed,
    rows_in,
    shard_count,
    shard_name,
)
from retrikt_ray.store.rows import GENERATED
from retrikt_ray.task.card import Task
from retrikt_ray.teacher.prompts import save_prompts


def test_a_rows_seed_follows_from_run_shard_and_position() -> None:
    assert row_seed(5, 2, 7) == int.from_bytes(hashlib.sha256(b"5:generate:2:7").digest()[:8], "big")
    assert len({row_seed(s, shard, i) for s in range(3) for shard in range(3) for i in range(3)}) == 27


def test_shards() -> None:
    assert [shard_count(GenerateConfig(rows=n, rows_per_shard=8)) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert shard_name(12) == "shard-00012.parquet"


IDS = [[row_id(shard, i) for i in range(2)] for shard in range(2)]


def sealed(path: Path, shards: list[list[str]], **errors: str) -> dict[str, int]:
    """What the stage makes of shards that are there already; errors: by id of the row."""
    out = {name: Folder.at(path / name) for name in ("generated", "scratch")}
    for number, ids in enumerate(shards):
        rows = [
            {"id": code, "text": "a text", "text_pair": None, "condition": 0, "finished": True, "tokens": 3, "error": errors.get(code)}
            for code in ids
        ]
        out["scratch"].write_table(shard_name(number), pa.Table.from_pylist(rows, schema=GENERATED))
    return generate(GenerateConfig(rows=4, rows_per_shard=2, workers=2), {}, out, seed=0)


@pytest.mark.parametrize(("part_rows", "parts"), [(500, [4]), (3, [2, 2]), (1, [2, 2])])
def test_complete_shards_become_parts(
    part_rows: int, parts: list[int], cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "PART_ROWS", part_rows)
    assert sealed(tmp_path, IDS) == {"rows": 4, "shards": 2}
    made = Folder.at(tmp_path / "generated")
    assert [made.read_table(name).num_rows for name in made.files()] == parts
    assert made.files() == [f"part-{i:05d}.parquet" for i in range(len(parts))] and made.read_tables()["id"].to_pylist() == [
        *IDS[0],
        *IDS[1],
    ]


def test_shards_of_a_part_share_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shards, out = GenerateConfig(rows=9, rows_per_shard=2), Folder.at(tmp_path / "shards"), Folder.at(tmp_path / "out")
    for shard in range(5):
        rows = [{"id": row_id(shard, i), "text": f"{shard}{i}"} for i in range(rows_in(config, shard))]
        shards.write_table(shard_name(shard), pa.Table.from_pylist(rows, schema=GENERATED))
    monkeypatch.setattr(stage, "GROUP_ROWS", 4)
    assert join(config, shards, out, 0, 0, 5) == {}
    assert [rows for *_, rows in Source.of(out).groups] == [4, 4, 1]


@pytest.mark.parametrize(("shard", "found"), [(["generated-00001-0000"], "1 rows, 1"), (["generated-00001-0000"] * 2, "2 rows, 1")])
def test_a_lost_or_doubled_row_is_refused(shard: list[str], found: str, cluster: None, tmp_path: Path) -> None:
    expected = "different ids; expected generated-00001-0000 to generated-00001-0001. Remove it and run again"
    with pytest.raises(ConfigError, match=rf"shard-00001.parquet: {found} {expected}"):
        sealed(tmp_path, [IDS[0], shard])
    assert not Folder.at(tmp_path / "generated").files()


def test_no_rows_are_an_empty_table(tmp_path: Path) -> None:
    out = {name: Folder.at(tmp_path / name) for name in ("generated", "scratch")}
    assert generate(GenerateConfig(rows=0), {}, out, seed=0) == {"rows": 0}
    assert out["generated"].read_tables().schema == GENERATED and out["generated"].read_tables().num_rows == 0


def test_few_failed_rows_are_told_and_many_end_the_run(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {IDS[1][0]: "MemoryError: no room"}
    with pytest.raises(
        ConfigError, match=r"1 of 4 texts could not be written, more than 1%; the first, generated-00001-0000: MemoryError: no room"
    ) as told:
        sealed(tmp_path, IDS, **errors)
    assert "mend the cause and run again" in str(told.value)
    assert Folder.at(tmp_path / "scratch").files() == ["shard-00000.parquet"]  # the others are kept
    monkeypatch.setattr(stage, "MOST_ERRORS", 0.25)
    assert sealed(tmp_path, IDS, **errors) == {"rows": 4, "shards": 2, "errors": 1}


class Scripted:
    """An engine that cannot write where the seed is a multiple of `bad`, and says how many rows it was asked for at a time."""

    bad = 0

    def __init__(self, order: Order) -> None:
        self.order, self.asked = order, []  # type: tuple[Order, list[int]]

    def generate(self, conditions: list[int], seeds: list[int]) -> list[Generated]:
        self.asked.append(len(seeds))
        if self.bad and any(seed % self.bad == 0 for seed in seeds):
            raise MemoryError("no room")
        return [Generated(f"text {seed}", 2, True) for seed in seeds]


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardWriter:
    monkeypatch.setitem(ENGINES, "transformers", Scripted)
    monkeypatch.setattr(Scripted, "bad", 0)
    teacher, task = Folder.at(tmp_path / "teacher"), Task("t", "classification", ("a", "b"), ("a", "b"), "{label}: ", False, "accuracy")
    teacher.write_json("teacher.json", {"base": "embedded", "dtype": "auto", "chat": False, "max_tokens": 8, "starts": {"Ll": 3}})
    save_prompts(teacher, torch.zeros(2, 3, 4), "embedded")
    return ShardWriter(GenerateConfig(rows=19, rows_per_shard=8), task, teacher, teacher, Folder.at(tmp_path / "out"), 5, 1, 0)


def test_a_row_that_cannot_be_written_keeps_its_error_and_costs_no_other(writer: ShardWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [row_seed(5, 1, i) for i in range(8)]
    monkeypatch.setattr(Scripted, "bad", seeds[5])
    rows = writer.write([1])[0].to_pylist()
    assert [row["error"] for row in rows] == [None] * 5 + ["MemoryError: no room"] + [None] * 2
    assert [row["text"] for row in rows] == [f"text {seed}" if i != 5 else "" for i, seed in enumerate(seeds)]
    assert [row["condition"] for row in rows] == [0, 1] * 4 and rows[5]["tokens"] == 0 and not rows[5]["finished"]
    assert writer.engine.asked == [8, 4, 4, 2, 1, 1, 2]  # halves, down to the one


def test_an_engine_that_writes_nothing_ends_the_run_with_its_own_error(writer: ShardWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "bad", 1)
    with pytest.raises(MemoryError, match="no room"):
        writer.write([0])
    assert not writer.folder.files()


def test_shards_that_are_written_together_are_the_same(writer: ShardWriter) -> None:
    alone = [writer.write([shard])[0] for shard in (0, 1, 2)]
    assert [table.num_rows for table in alone] == [8, 8, 3] and writer.engine.asked == [8, 8, 3]
    assert writer({"shards": [[0, 2], [1]]}) == {"rows": [8, 3, 8], "tokens": [16, 6, 16]} and writer.engine.asked[3:] == [19]
    assert writer.write([0, 2, 1]) == [alone[0], alone[2], alone[1]]
    assert [writer.folder.read_table(shard_name(shard)) for shard in (0, 1, 2)] == alone


def test_what_a_worker_is_handed() -> None:
    """One shard at a time on a CPU; on GPUs as many as hold 4,096 texts, and half of a fair share of what is left at most."""
    config, shards = GenerateConfig(rows=2000 * 10, rows_per_shard=2000), list(range(3, 13))
    assert handed(shards, config, Workers(2, 1, 0)) == [[shard] for shard in shards]
    assert handed(shards, config, Workers(1, 1, 1)) == [[3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]
    assert handed(shards, config, Workers(2, 1, 1)) == [[3, 4], [5, 6], [7, 8], [9], [10], [11], [12]]
    assert handed([5], GenerateConfig(rows_per_shard=9000), Workers(2, 1, 0.5)) == [[5]]
    assert handed([], config, Workers(2, 1, 1)) == []


def test_spent() -> None:
    config = GenerateConfig(max_tokens=1000, max_seconds=60, max_cost=2, price_per_hour=30)
    assert config.spent(999, 59, 4) is None  # 59 s of 4 workers at 30 an hour: 1.97
    assert config.spent(1000, 0, 1) == "max_tokens (1,000)"
    assert config.spent(0, 60, 1) == "max_seconds (60)"
    assert GenerateConfig(max_cost=2, price_per_hour=30).spent(10**9, 60, 4) == "max_cost (2)"
    assert GenerateConfig().spent(10**9, 10**9, 99) is None
    with pytest.raises(ValidationError, match="max_cost needs price_per_hour"):
        GenerateConfig(max_cost=2)
    assert GenerateConfig().fingerprint_view() == config.fingerprint_view()  # a limit does not make other texts
