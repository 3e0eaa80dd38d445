"""How many requests an object store gets: what a stage does with each of its files, and with all of them."""

from __future__ import annotations

import pickle
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.runtime.tables import Source, writing

PARTS, ROWS = 20, 120


@pytest.fixture
def requests(s3: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Counter[str]]:
    """The requests that a call makes, by kind."""
    import s3fs

    made: list[str] = []
    send = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *args: Any, **keys: Any) -> Any:
        made.append(method)
        return await send(self, method, *args, **keys)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)

    def of(call: Callable[[], Any]) -> Counter[str]:
        made.clear()
        call()
        return Counter(made)

    return of


def test_requests_of_an_artifact(requests: Callable[[Callable[[], Any]], Counter[str]], s3: str) -> None:
    """Written 1 a part, sealed 2, checked 1, read 1; and a handful for all of them, whatever their number."""
    folder = Folder.at(f"{s3}/requests-{uuid.uuid4().hex[:8]}")
    table = pa.table({"id": [f"{i}" for i in range(ROWS)], "text": ["a text"] * ROWS})

    def write() -> None:
        for part in range(PARTS):
            folder.write_table(f"part-{part:05d}.parquet", table)

    def rows() -> None:
        source = Source.of(folder)
        assert sum(len(found) for _, found in source.read(0, source.rows, ("id",))) == PARTS * ROWS

    artifacts.open_draft(folder, "f")
    assert requests(write) == {"put_object": PARTS}
    keys: dict[str, Any] = {"stage": "x", "fingerprint": "f", "config": {}, "inputs": {}, "seed": 0, "started": 0.0}
    assert requests(lambda: artifacts.seal(folder, **keys)).total() <= 2 * PARTS + 8
    assert requests(lambda: artifacts.read_manifest(folder)) == {"get_object": 1}
    assert requests(lambda: artifacts.read_manifest(folder / "other")) == {"get_object": 1}
    assert requests(lambda: artifacts.check(folder)).total() <= 2
    assert requests(lambda: artifacts.check(folder, deep=True)).total() <= PARTS + 2
    assert requests(folder.files).total() == 1
    assert requests(folder.read_tables).total() <= PARTS + 1
    assert requests(rows).total() <= 2 * PARTS + 1


def test_requests_of_a_large_part(requests: Callable[[Callable[[], Any]], Counter[str]], s3: str) -> None:
    """A row group is one request, whatever lies between the columns that are asked for; footers are read once, and again where the table has travelled."""
    folder = Folder.at(f"{s3}/requests-{uuid.uuid4().hex[:8]}")
    vector = pa.FixedSizeListArray.from_arrays(pa.array(range(512 * 64), pa.float32()), 64)
    table = pa.table({"id": [f"{i}" for i in range(512)], "text": ["a text"] * 512, "vector": vector, "source": ["task"] * 512})
    with writing(folder, "part-00000.parquet", table.schema) as part:
        for _ in range(PARTS):
            part.write_table(table)
    source = Source.of(folder)

    def read(source: Source, low: int, high: int) -> None:
        assert [found.num_rows for _, found in source.read(low * 512, high * 512, ("text", "vector"))] == [512] * (high - low)

    assert requests(lambda: Source.of(folder)) == {"list_objects_v2": 1, "get_object": 1}
    assert requests(lambda: read(source, 7, 8)) == {"get_object": 1}
    assert requests(lambda: read(source, 0, PARTS)) == {"get_object": PARTS}
    assert requests(lambda: read(pickle.loads(pickle.dumps(source)), 7, 10)) == {"get_object": 1 + 3}


def test_a_place_whose_library_is_missing_is_refused_by_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    def missing(uri: str, **keys: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"s3://runs/mine: Install s3fs to access S3 \(pip install 'retrikt-ray\[s3\]'"):
        Folder.at("s3://runs/mine").exists()
