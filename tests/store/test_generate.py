"""Generation: seeds by row, shards, and the seal on exactly once. The texts themselves: `test_engines.py` and the pipeline's tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.store.generate import GenerateConfig, generate, row_seed, shard_count, shard_name
from retrikt_ray.store.rows import GENERATED


def test_a_rows_seed_follows_from_run_shard_and_position() -> None:
    assert row_seed(5, 2, 7) == int.from_bytes(hashlib.sha256(b"5:generate:2:7").digest()[:8], "big")
    assert len({row_seed(s, shard, i) for s in range(3) for shard in range(3) for i in range(3)}) == 27


def test_shards() -> None:
    assert [shard_count(GenerateConfig(rows=n, rows_per_shard=8)) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert shard_name(12) == "part-00012.parquet"


def sealed(folder: Folder, shards: list[list[str]]) -> dict[str, int]:
    """What the stage makes of a folder in which all shards lie already."""
    for number, ids in enumerate(shards):
        rows = [{"id": code, "text": "a text", "text_pair": None, "condition": 0, "finished": True, "tokens": 3} for code in ids]
        folder.write_table(shard_name(number), pa.Table.from_pylist(rows, schema=GENERATED))
    return generate(GenerateConfig(rows=4, rows_per_shard=2), {}, {"generated": folder}, seed=0)


def test_complete_shards_are_not_made_again(tmp_path: Path) -> None:
    assert sealed(Folder.at(tmp_path), [["a", "b"], ["c", "d"]]) == {"rows": 4, "shards": 2}


@pytest.mark.parametrize(
    ("shards", "found"), [([["a", "b"], ["c"]], "3 rows, 3 different ids"), ([["a", "b"], ["b", "c"]], "4 rows, 3 different ids")]
)
def test_a_lost_or_doubled_row_is_refused(shards: list[list[str]], found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{found}; expected 4. Remove the folder and run again"):
        sealed(Folder.at(tmp_path), shards)


def test_no_rows_are_an_empty_table(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    assert generate(GenerateConfig(rows=0), {}, {"generated": folder}, seed=0) == {"rows": 0}
    assert folder.read_tables().schema == GENERATED and folder.read_tables().num_rows == 0
