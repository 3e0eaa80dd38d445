"""The store's columns: the one module that knows them, from a generated text to a row of `store/` or `rejected/`.

A new column is a field of `Row`, a type in `store_schema`, and its value where the row is made (`annotate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

GENERATED = pa.schema(  # of `generated/`
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("text_pair", pa.string()),
        ("condition", pa.int32()),  # what the text was asked to be
        ("finished", pa.bool_()),  # ended by <eos>, not by the length limit
        ("tokens", pa.int32()),
        ("error", pa.string()),  # why there is no text
    ]
)
HARVESTED = pa.schema(  # of `harvested/`
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("text_pair", pa.string()),
        ("file", pa.string()),  # of the corpus, where it stands
        ("nearness", pa.float32()),  # mean cosine to the nearest labelled rows
    ]
)
ANNOTATED = pa.schema(  # of what annotators hand over, whatever the source; null where the source has no such column, or the text is empty
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("text_pair", pa.string()),
        ("condition", pa.int32()),
        ("value", pa.float64()),
        ("finished", pa.bool_()),
        ("error", pa.string()),
        ("probs", pa.list_(pa.float32())),
        ("embedding", pa.list_(pa.float32())),
    ]
)
VIEWED = ("id", "text", "text_pair", "source", "asked_label", "teacher_probs")  # columns that a reader of the store keeps in memory


@dataclass(frozen=True)
class Row:
    """One row of the store."""

    id: str
    text: str
    text_pair: str | None
    asked_label: str | None  # the condition of a generated text, the true label of a task or added row, else None
    condition: int | None
    value: float | None  # true class id or number of a task row
    teacher_probs: list[float] | None  # class probabilities, or one value in regression
    teacher_embedding: list[float] | None
    source: str  # generated | task | unlabelled | corpus | added
    created_by: str  # fingerprint of the artifact with the texts, or the edit


def store_schema(width: int) -> pa.Schema:
    """Columns of `store/`; `width` is the size of the teacher's embedding."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("text", pa.string()),
            ("text_pair", pa.string()),
            ("asked_label", pa.string()),
            ("condition", pa.int32()),
            ("value", pa.float64()),
            ("teacher_probs", pa.list_(pa.float32())),
            ("teacher_embedding", pa.list_(pa.float32(), width)),
            ("source", pa.string()),
            ("created_by", pa.string()),
        ]
    )


def rejected_schema(width: int) -> pa.Schema:
    """Columns of `rejected/`."""
    return store_schema(width).append(pa.field("reason", pa.string()))


def table_of(rows: list[Row], schema: pa.Schema, more: list[dict[str, Any]] | None = None) -> pa.Table:
    """Rows as a table of `schema`; more: by row, the columns that the schema has beside the store's."""
    records = [vars(row) for row in rows]
    return pa.Table.from_pylist([r | m for r, m in zip(records, more, strict=True)] if more is not None else records, schema=schema)
