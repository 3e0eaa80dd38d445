"""Editing the knowledge of a run: add, update, delete. The student is not trained again; its answers change with what it retrieves.

    knowledge = Knowledge(Folder.at("runs/mine"))
    ids = add(knowledge, [{"text": "Gas smell on floor 3", "label": "safety"}])   # or without a label: the teacher gives it
    delete(knowledge, ids)

Each call is one edit: all of it is there when it returns, or none of it (`edits.py`). The id of an added row, where none is given, follows from
its text, so that a call that is repeated after a crash does not add a row twice.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from numbers import Real
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrikt_ray.index.build import Source
from retrikt_ray.index.index import StudentVectors
from retrikt_ray.knowledge import log as edits
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.knowledge.log import State, edit_schema, read_edit, read_state, writing
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.files import is_number, tidy

KEYS = ("id", "text", "text_pair", "label", "teacher_probs")


def checked(rows: list[dict[str, Any]], task: dict[str, Any], old: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Rows as {id, text, text_pair, asked_label, teacher_probs}; teacher_probs None where the teacher is to say.

    old: what the rows update, whose text stays where a row has none. Raises ConfigError that names the row, what was found and what was expected.
    """
    out = []
    for i, row in enumerate(rows):
        where = f"row {i + 1}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: found {row!r}, expected an object with text, and label or teacher_probs or neither")
        given = {k: v for k, v in row.items() if not (v is None or (isinstance(v, str) and v == ""))}  # CSV: what is absent is empty
        unknown = [k for k in given if k not in KEYS]
        if unknown:
            raise ConfigError(f"{where}: there is no field {unknown[0]!r}; expected {', '.join(KEYS)}")
        if old is not None and not given.keys() - {"id"}:
            raise ConfigError(f"{where}: nothing to update; expected text, text_pair, label or teacher_probs beside the id")
        before = old[i] if old is not None else {}
        texts: dict[str, str | None] = {"text_pair": None}
        for field in ("text", "text_pair") if task["pair"] else ("text",):
            value = given.get(field, before.get(field))
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"{where}: {field}: found {value!r}, expected a text")
            texts[field] = tidy(writable(value, f"{where}: {field}"))
        if not task["pair"] and "text_pair" in given:
            raise ConfigError(f"{where}: text_pair is given, but {task['name']} takes single texts")
        probs, label = soft_label(given, task, where)
        if probs is None and all(texts[f] == before.get(f) for f in texts):  # an update that changes nothing
            probs, label = before["teacher_probs"], before["asked_label"]
        code = given.get("id")
        if code is not None and (not isinstance(code, str) or not code):
            raise ConfigError(f"{where}: id: found {code!r}, expected a string")
        writable(code or "", f"{where}: id")
        plain = f"{texts['text']}\x1f{texts['text_pair'] or ''}"
        made = "added-" + hashlib.blake2b(plain.encode(), digest_size=8).hexdigest()
        out.append({"id": code or made, **texts, "asked_label": label, "teacher_probs": probs})
    places: dict[str, int] = {}
    for i, row in enumerate(out):
        code = str(row["id"])
        if code in places:
            why = "" if rows[i].get("id") else ": the same text"
            raise ConfigError(f"rows {places[code] + 1} and {i + 1} have the same id, {code!r}{why}")
        places[code] = i
    return out


def soft_label(given: dict[str, Any], task: dict[str, Any], where: str) -> tuple[list[float] | None, str | None]:
    """Teacher probabilities (or the one value of a regression) that a row gives, and its label as text."""
    labels, probs, label = task["labels"], given.get("teacher_probs"), given.get("label")
    if probs is not None and label is not None:
        raise ConfigError(f"{where}: found label and teacher_probs, expected one of them")
    if probs is not None:
        count = max(1, len(labels))
        if isinstance(probs, str):  # of a CSV file
            with suppress(ValueError):
                probs = json.loads(probs)
        values = probs.tolist() if isinstance(probs, np.ndarray) else probs
        if (
            not isinstance(values, list | tuple)
            or len(values) != count
            or not all(isinstance(v, Real) and not isinstance(v, bool) for v in values)
        ):
            raise ConfigError(f"{where}: teacher_probs: found {probs!r}, expected a list of {count} numbers")
        sure = np.asarray(values, dtype=np.float64)
        if not np.isfinite(sure).all() or (labels and (sure.min() < 0 or abs(sure.sum() - 1) > 1e-3)):
            raise ConfigError(f"{where}: teacher_probs: found {probs!r}, expected probabilities that sum to 1")
        return sure.tolist(), None
    if label is None:
        return None, None
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ConfigError(f"{where}: label: found {label!r}, expected {'a text' if labels else 'a number'}")
    name = str(label).strip()  # as in the task's own files
    if labels:
        if name not in labels:
            raise ConfigError(f"{where}: label: found {label!r}; the labels of {task['name']} are {', '.join(labels)}")
        return np.eye(len(labels))[labels.index(name)].tolist(), name
    if not is_number(name):
        raise ConfigError(f"{where}: label: found {label!r}, expected a number")
    return [float(name)], name


def writable(text: str, where: str) -> str:
    """The text. Raises ConfigError when UTF-8 cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: found half of a surrogate pair: {text!a}; expected text that can be written as UTF-8") from None
    return text


def labelled(run: Folder, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with teacher_probs and, where the teacher was asked, teacher_embedding."""
    asked = [i for i, r in enumerate(rows) if r["teacher_probs"] is None]
    out = [r | {"teacher_embedding": None} for r in rows]
    if asked:
        from retrikt_ray.teacher.annotator import Classifier

        check(run / "teacher", deep=True)
        probs, embeddings = Classifier.load(run / "teacher").annotate([(rows[i]["text"], rows[i]["text_pair"]) for i in asked], 64)
        for i, p, e in zip(asked, probs.tolist(), embeddings.tolist(), strict=True):
            out[i] |= {"teacher_probs": p, "teacher_embedding": e}
    return out


def commit(knowledge: Knowledge, rows: list[dict[str, Any]], gone: list[int]) -> None:
    """Log rows and deletions, and open the result. Under `writing`, after `refresh`.

    1. The edit, in memory.  2. Write it.
    """
    run, folder = knowledge.run, knowledge.folder
    # 1. the edit
    if check(run / "student", deep=True).content != knowledge.student:
        raise ArtifactError(f"{run}/student was made anew since this process opened it: start the process again")
    state = knowledge.state or State(0, None, knowledge.contents, knowledge.contents["store"])
    with (knowledge.where / "store").parquet(Source.of(knowledge.where / "store").groups[0][0]) as file:
        schema = edit_schema(file.schema_arrow, knowledge.card["width"])
    labels = labelled(run, rows)
    vectors = StudentVectors(run / "student", knowledge.card["width"], knowledge.threads)
    texts = pa.table({k: pa.array([r[k] for r in labels], pa.string()) for k in ("text", "text_pair")})
    first = knowledge.rows.num_rows
    log: list[dict[str, Any]] = [{"deleted": True, "position": p} for p in gone]
    log += [
        row | {"deleted": False, "position": first + i, "vector": v, "source": "added", "created_by": f"edit-{state.version + 1:06d}"}
        for i, (row, v) in enumerate(zip(labels, vectors.of(texts), strict=True))
    ]
    table = pa.Table.from_pylist([{n: r.get(n) for n in schema.names} for r in log], schema=schema)
    # 2. write
    if knowledge.state is None:
        folder.write_sealed(MANIFEST, asdict(state))  # from now on a folder without manifest is a damaged one
    edits.sweep(folder, state)
    edits.commit(folder, state, table)
    knowledge.refresh(at_once=True)


def known(knowledge: Knowledge, ids: list[str]) -> list[int]:
    """Positions of live rows. Raises ConfigError that names the id that there is not."""
    found = knowledge.find(ids)
    missing = [i for i in ids if i not in found]
    if missing:
        raise ConfigError(
            f"{knowledge.run} has no row with the id {missing[0]!r}" + (f" (and {len(missing) - 1} more)" if missing[1:] else "")
        )
    return [found[i] for i in ids]


def add(knowledge: Knowledge, rows: list[dict[str, Any]]) -> list[str]:
    """Add rows {text, text_pair?, label? | teacher_probs?, id?} and return their ids; what has no label gets the teacher's."""
    fresh = checked(rows, knowledge.task)
    if not fresh:
        raise ConfigError("no rows to add")
    with writing(knowledge.run):
        knowledge.refresh(at_once=True)
        there = knowledge.find([r["id"] for r in fresh])
        for i, row in enumerate(fresh):
            if row["id"] in there:
                raise ConfigError(f"row {i + 1}: {knowledge.run} has a row {row['id']!r} already ({row['text'][:60]!r}); use update")
        commit(knowledge, fresh, [])
    return [r["id"] for r in fresh]


def update(knowledge: Knowledge, rows: list[dict[str, Any]]) -> list[str]:
    """Change rows {id, text?, text_pair?, label? | teacher_probs?}; a changed text without a label gets the teacher's. Ids stay."""
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise ConfigError(f"row {i + 1}: found no id; update takes rows with the id of what they change")
    if not rows:
        raise ConfigError("no rows to update")
    with writing(knowledge.run):
        knowledge.refresh(at_once=True)
        positions = known(knowledge, [r["id"] for r in rows])
        fresh = checked(rows, knowledge.task, [knowledge.row(p) for p in positions])
        commit(knowledge, fresh, positions)
    return [r["id"] for r in fresh]


def delete(knowledge: Knowledge, ids: list[str]) -> None:
    """Delete rows by id."""
    if not ids:
        raise ConfigError("no ids to delete")
    with writing(knowledge.run):
        knowledge.refresh(at_once=True)
        positions = known(knowledge, list(dict.fromkeys(ids)))
        if len(positions) == knowledge.count:
            raise ConfigError(f"this would delete all {knowledge.count} rows of {knowledge.run}; a store keeps one at least")
        commit(knowledge, [], positions)


def added_rows(run: Folder) -> list[dict[str, Any]]:
    """The rows that edits brought and did not delete, in the form that `add` takes; also where the rest of the run was made anew since.

    A row that an update changed leaves its id behind where the run's store has it, too.
    """
    state = read_state(run / "knowledge")
    if state is None:
        return []
    keys = ["id", "text", "text_pair", "teacher_probs"]
    rows: dict[int, dict[str, Any]] = {}
    if state.base:
        base = (run / "knowledge" / state.base / "store").read_tables(columns=[*keys, "source"])
        positions = pc.indices_nonzero(pc.equal(base["source"], "added"))
        rows = dict(zip(positions.to_pylist(), base.select(keys).take(positions).to_pylist(), strict=True))
    for edit in state.edits:
        for row in read_edit(run / "knowledge", edit).select(["deleted", "position", *keys]).to_pylist():
            if row.pop("deleted"):
                rows.pop(row["position"], None)
            else:
                rows[row.pop("position")] = row
    taken = set((run / "store").read_tables(columns=["id"])["id"].to_pylist()) if (run / "store").exists() else set()
    found = [{k: row[k] for k in keys if row[k] is not None} for _, row in sorted(rows.items())]
    return [{k: v for k, v in row.items() if k != "id" or v not in taken} for row in found]
