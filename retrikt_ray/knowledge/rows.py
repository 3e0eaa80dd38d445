"""Rows that a person or a program hands over to be added or changed, checked before anything is written."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np

from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.card import Task
from retrikt_ray.task.files import is_number
from retrikt_ray.task.texts import read_string

KEYS = ("id", "text", "text_pair", "label", "teacher_probs")


def checked(rows: list[dict[str, Any]], task: Task, old: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Rows as {id, text, text_pair, asked_label, teacher_probs}; teacher_probs None where the teacher is to say.

    old: what the rows update, whose text stays where a row has none. Raises ConfigError or TextError that names the row, what was found and what was expected.
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
        for field in ("text", "text_pair") if task.pair else ("text",):
            texts[field] = read_string(given.get(field, before.get(field)), f"{where}: {field}")
        if not task.pair and "text_pair" in given:
            raise ConfigError(f"{where}: text_pair is given, but {task.name} takes single texts")
        probs, label = soft_label(given, task, where)
        if probs is None and all(texts[f] == before.get(f) for f in texts):  # an update that changes nothing
            probs, label = before["teacher_probs"], before["asked_label"]
        code = given.get("id")
        if code is not None:
            read_string(code, f"{where}: id", "a string")
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


def soft_label(given: dict[str, Any], task: Task, where: str) -> tuple[list[float] | None, str | None]:
    """Teacher probabilities (or the one value of a regression) that a row gives, and its label as text."""
    labels, probs, label = task.labels, given.get("teacher_probs"), given.get("label")
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
            raise ConfigError(f"{where}: label: found {label!r}; the labels of {task.name} are {', '.join(labels)}")
        return np.eye(len(labels))[labels.index(name)].tolist(), name
    if not is_number(name):
        raise ConfigError(f"{where}: label: found {label!r}, expected a number")
    return [float(name)], name
