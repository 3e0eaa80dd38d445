"""Reading a task: files or a hub dataset in, checked rows out. Errors name the file and the line.

Kept apart from the stage (`prepare.py`), so that a table of a million rows can be checked without Ray or torch.
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from retrikt_ray.runtime.folders import Folder
from retrikt_ray.task.texts import DataError, read_string

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
HUB = "hf://datasets/"


@dataclass(frozen=True)
class Columns:
    """Names of the columns in the user's files; `text_pair` is None for single texts, `label` for unlabelled texts."""

    text: str
    text_pair: str | None
    label: str | None


def read_rows(uri: str) -> list[dict[str, Any]]:
    """All rows of one JSONL, CSV, TSV or Parquet file (by its suffix; .txt: one text a line, column `text`)."""
    head, _, name = uri.rpartition("/")
    folder = Folder.at(head or ".")
    if not folder.exists(name):
        raise DataError(f"{uri}: no such file")
    if name.endswith(".parquet"):
        return folder.read_table(name).to_pylist()
    data = folder.read_bytes(name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = data[: error.start].count(b"\n") + 1
        raise DataError(f"{uri}, line {at}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    if name.endswith(".txt"):
        return [{"text": line} for line in text.splitlines() if line.strip()]
    if name.endswith((".csv", ".tsv")):
        return read_csv(text, uri, "\t" if name.endswith(".tsv") else ",")
    if not name.endswith((".jsonl", ".json")):
        raise DataError(f"{uri}: cannot read this kind of file; known are {', '.join(SUFFIXES)} and .txt")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{uri}, line {number}: not JSON ({error}); expected one JSON object per line") from None
        if not isinstance(row, dict):
            raise DataError(f"{uri}, line {number}: found {type(row).__name__}, expected a JSON object")
        rows.append(row)
    return rows


def read_csv(text: str, uri: str, delimiter: str) -> list[dict[str, Any]]:
    """Rows of a CSV file with a header. Raises DataError that names the line that has too many fields, or that csv cannot read."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = []
    try:
        for row in reader:
            if None in row:
                names = ", ".join(reader.fieldnames or ())
                raise DataError(
                    f"{uri}, line {reader.line_num}: found more fields than the header has ({names}); quote fields that hold {delimiter!r}"
                )
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{uri}, line {reader.line_num + 1}: not CSV ({error})") from None
    return rows


def find_splits(uri: str) -> dict[str, str]:
    """The split files of a folder: train (required), validation or dev, test. A single file is the train split."""
    if uri.endswith(SUFFIXES):
        return {"train": uri}
    folder = Folder.at(uri)
    if not folder.exists():
        raise DataError(f"{uri}: no such file or folder (a hub dataset is written {HUB}OWNER/NAME)")
    found = {}
    for split, stems in SPLITS.items():
        names = [stem + suffix for stem in stems for suffix in SUFFIXES if folder.exists(stem + suffix)]
        if len(names) > 1:
            raise DataError(f"{uri}: {' and '.join(names)} both look like the {split} split; leave one")
        if names:
            found[split] = posixpath.join(folder.uri, names[0])
    if "train" not in found:
        raise DataError(f"{uri}: no train file; expected train{{{','.join(SUFFIXES)}}}")
    return found


def read_hub(uri: str, subset: str | None, revision: str | None, label: str) -> dict[str, list[dict[str, Any]]]:
    """Splits of a Hugging Face dataset; class ids become class names. Rows whose label is hidden (-1) are left out."""
    from datasets import ClassLabel, load_dataset

    loaded = load_dataset(uri.removeprefix(HUB), subset, revision=revision)
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, stems in SPLITS.items():
        name = next((s for s in stems if s in loaded), None)
        if name is None:
            continue
        table = loaded[name]
        feature = table.features.get(label)
        rows = [dict(r) for r in table]
        if isinstance(feature, ClassLabel):
            rows = [r | {label: feature.int2str(r[label])} for r in rows if r[label] is not None and r[label] >= 0]
        if rows:
            splits[split] = rows
    return splits


def check_rows(rows: Iterable[dict[str, Any]], columns: Columns, where: str) -> list[dict[str, Any]]:
    """Rows as {text, text_pair, label}, tidied. Raises DataError on a missing column or an empty text."""
    checked = []
    for number, row in enumerate(rows, 1):
        for name in (columns.text, columns.text_pair, columns.label):
            if name is not None and row.get(name) is None:
                raise DataError(f"{where}, row {number}: no column {name!r}; the row has {', '.join(map(str, row))}")
        out = {"text": read_string(str(row[columns.text]), f"{where}, row {number}: {columns.text}"), "text_pair": None, "label": None}
        if columns.text_pair:
            out["text_pair"] = read_string(str(row[columns.text_pair]), f"{where}, row {number}: {columns.text_pair}")
        if columns.label:
            out["label"] = str(row[columns.label]).strip()
            if not out["label"]:
                raise DataError(f"{where}, row {number}: the label is empty")
        checked.append(out)
    if not checked:
        raise DataError(f"{where}: no rows")
    return checked


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_labels(splits: dict[str, list[dict[str, Any]]], problem: str, where: str) -> list[str]:
    """The class names in sorted order (empty for regression).

    Raises DataError for a single class, for labels that train lacks, and for a label that is no number in regression.
    """
    if problem == "regression":
        for split, rows in splits.items():
            bad = next((i for i, r in enumerate(rows, 1) if not is_number(r["label"])), None)
            if bad is not None:
                raise DataError(f"{where}, {split} row {bad}: the label {rows[bad - 1]['label']!r} is not a number (regression)")
        return []
    labels = sorted({r["label"] for r in splits["train"]})
    if len(labels) < 2:
        raise DataError(f"{where}: all {len(splits['train'])} train rows have the label {labels[0]!r}; at least two classes are needed")
    for split, rows in splits.items():
        unknown = sorted({r["label"] for r in rows} - set(labels))
        if unknown:
            raise DataError(f"{where}: {split} has labels that train lacks: {', '.join(unknown[:5])}; train has {', '.join(labels[:8])}")
    return labels
