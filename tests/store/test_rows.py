"""The store's columns, and rows on their way into a table and back."""

from __future__ import annotations

from dataclasses import fields, replace

import pyarrow as pa
import pytest

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.store.rows import VIEWED, Row, rejected_schema, store_schema, table_of

ROW = Row("a-0", "a text", None, "good", 1, 1.0, [0.25, 0.75], [1.0, 2.0, 3.0], "task", "made")


def test_store_schema() -> None:
    schema = store_schema(3)
    assert [f"{f.name}: {f.type}" for f in schema] == [
        "id: string",
        "text: string",
        "text_pair: string",
        "asked_label: string",
        "condition: int32",
        "value: double",
        f"teacher_probs: {pa.list_(pa.float32())}",
        f"teacher_embedding: {pa.list_(pa.float32(), 3)}",
        "source: string",
        "created_by: string",
    ]
    assert schema.field("teacher_embedding").type.list_size == 3
    good = {"id": "a", "text": "t", "teacher_probs": [0.5], "teacher_embedding": [1, 2, 3]}
    assert pa.Table.from_pylist([good], schema=schema).num_rows == 1
    with pytest.raises(pa.ArrowInvalid):
        pa.Table.from_pylist([good | {"teacher_embedding": [1, 2]}], schema=schema)


def test_a_row_has_the_columns_of_the_store() -> None:
    assert [f.name for f in fields(Row)] == store_schema(3).names
    assert set(VIEWED) <= set(store_schema(3).names)
    assert rejected_schema(3).names == [*store_schema(3).names, "reason"]


def test_rows_survive_the_table(tmp_path: object) -> None:
    folder = Folder.at(str(tmp_path))
    rows = [ROW, replace(ROW, id="a-1", teacher_probs=[1.0, 0.0], asked_label=None)]
    folder.write_table("part-00000.parquet", table_of(rows, store_schema(3)))
    assert [Row(**record) for record in folder.read_tables().to_pylist()] == rows
    rejected = table_of([replace(ROW, teacher_probs=None, teacher_embedding=None)], rejected_schema(3), [{"reason": "empty"}])
    assert rejected["reason"].to_pylist() == ["empty"] and rejected["teacher_embedding"].to_pylist() == [None]
