"""Why annotated rows do not enter the store: what speaks against a row by itself, and what the whole store does, which are duplicates.

The first is found run by run of chunks, in parallel; then one task, or the driver where there is one run, holds numbers of all rows (their keys,
shingles and hashes, some 500 bytes a row) and no Python object of any. What is decided is a function of the rows and their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pydantic import Field

from retrikt_ray.runtime.cluster import Workers, each
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import Scaled
from retrikt_ray.store.duplicates import HeldOut, Ragged, band_keys, key, near_duplicates, repeated, shingles
from retrikt_ray.task.texts import texts_of
from retrikt_ray.task.words import words

READ = ["text", "text_pair", "condition", "finished", "error", "probs"]  # what a decision looks at
REASONS = (  # the first of them counts, but that a duplicate is one whatever its label; the last two need the rows before
    "failed",
    "empty",
    "leakage",
    "too_short",
    "unfinished",
    "low_confidence",
    "label_disagreement",
    "duplicate",
    "near_duplicate",
)
KEPT = len(REASONS)
LOW, DUPLICATE, NEAR = (REASONS.index(name) for name in ("low_confidence", "duplicate", "near_duplicate"))
RUN_ROWS = 10_000  # that a task looks at


class AnnotateConfig(Scaled):
    """Which texts become rows of the store."""

    batch: int = Field(64, ge=1, description="Texts per forward pass of the annotator.")
    min_words: int = Field(
        2, ge=1, description="Texts with fewer words are rejected (`too_short`); in scripts without spaces a character is a word."
    )
    keep_unfinished: bool = Field(
        True, description="Keep generated texts that the length limit cut off; else they are rejected (`unfinished`)."
    )
    min_confidence: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Texts that are not the task's labelled rows and whose top probability is lower are rejected (`low_confidence`). 0: off.",
    )
    near_duplicates: float = Field(
        0.8,
        ge=0.5,
        le=1,
        description="Texts, not the task's labelled rows, that share this much of their words and word pairs (Jaccard) with an earlier row are rejected (`near_duplicate`). 1: off.",
    )
    require_agreement: bool = Field(
        False, description="Reject generated texts that the teacher labels otherwise than asked (`label_disagreement`)."
    )


def has_text(row: dict[str, Any]) -> bool:
    """False for an empty text, and for a pair that lacks a side."""
    return bool(row["text"]) and row["text_pair"] != ""


@dataclass(frozen=True)
class Judged:
    """Rows in their order, and what is known of each by itself."""

    reasons: np.ndarray  # (N,) uint8: places in REASONS, or KEPT
    own: np.ndarray  # (N,) bool: whether it is the task's
    keys: np.ndarray  # (N, 2) uint64: equal for equal texts; of rows that are kept so far, or doubted for their labels
    sizes: np.ndarray  # (N,) int64: how many shingles it has, 0 but of rows that are kept so far
    shingles: np.ndarray  # uint32: of one row after another
    bands: np.ndarray  # (n, BANDS) uint64: of the n rows that have shingles

    @staticmethod
    def joined(parts: Sequence[Judged]) -> Judged:
        return Judged(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Judged)))


def reject_reason(row: dict[str, Any], source: str, held_out: HeldOut, config: AnnotateConfig) -> str | None:
    """What of a row itself keeps it from the store, or None: the first that applies."""
    if row["error"] is not None:
        return "failed"
    if not has_text(row):
        return "empty"
    text = row["text"], row["text_pair"]
    if held_out.equals(text) or (source != "task" and held_out.copied(text)):
        return "leakage"
    if source != "task" and len(words(row["text"])) < config.min_words:
        return "too_short"
    if source == "generated" and not row["finished"] and not config.keep_unfinished:
        return "unfinished"
    if source != "task" and len(row["probs"]) > 1:
        if max(row["probs"]) < config.min_confidence:
            return "low_confidence"
        if source == "generated" and config.require_agreement and int(np.argmax(row["probs"])) != row["condition"]:
            return "label_disagreement"
    return None


def judged(rows: list[dict[str, Any]], source: str, held_out: HeldOut, config: AnnotateConfig) -> Judged:
    """Rows of one source, by themselves."""
    found = [reject_reason(row, source, held_out, config) for row in rows]
    reasons = np.array([KEPT if reason is None else REASONS.index(reason) for reason in found], np.uint8)
    keys = np.zeros((len(rows), 2), np.uint64)
    for i in np.flatnonzero(reasons >= LOW):
        keys[i] = key(rows[i]["text"], rows[i]["text_pair"])
    near = (
        [shingles((rows[i]["text"], rows[i]["text_pair"])) for i in np.flatnonzero(reasons == KEPT)] if config.near_duplicates < 1 else []
    )
    sizes = np.zeros(len(rows), np.int64)
    if near:
        sizes[reasons == KEPT] = [len(row) for row in near]
    own = np.full(len(rows), source == "task")
    return Judged(reasons, own, keys, sizes, np.concatenate([np.zeros(0, np.uint32), *near]), band_keys(near))


def judge(config: AnnotateConfig, chunks: list[dict[str, Any]], task: Folder, scratch: Folder) -> Judged:
    """The annotated rows of some chunks, by themselves (a Ray task)."""
    held_out = HeldOut([t for split in ("validation", "test") for t in texts_of(task.read_table(f"{split}.parquet"))])
    return Judged.joined(
        [judged(scratch.read_table(part_name(chunk), READ).to_pylist(), chunk["source"], held_out, config) for chunk in chunks]
    )


def resolve(parts: list[Judged], threshold: float) -> np.ndarray:
    """Why each row is rejected, (N,) uint8, now that all are known (a Ray task). threshold: of near duplicates; 1: they are not looked for.

    A row that is rejected for its label keeps no later one out.
    """

    def of_all(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    reasons, sizes = of_all("reasons"), of_all("sizes")
    likely = np.flatnonzero(reasons >= LOW)
    reasons[likely[repeated(of_all("keys")[likely], reasons[likely] == KEPT)]] = DUPLICATE
    if threshold < 1:
        left, ends = np.flatnonzero(reasons == KEPT), np.cumsum(sizes)
        texts = Ragged(of_all("shingles"), ends[left] - sizes[left], ends[left])
        by_part = np.split(reasons, np.cumsum([len(part.reasons) for part in parts])[:-1])
        bands = np.concatenate([part.bands[some[part.sizes > 0] == KEPT] for part, some in zip(parts, by_part, strict=True)])
        reasons[left[near_duplicates(texts, of_all("own")[left], threshold, bands) >= 0]] = NEAR
    return reasons


def decide(config: AnnotateConfig, runs: list[list[dict[str, Any]]], task: Folder, scratch: Folder, workers: Workers | None) -> np.ndarray:
    """Why each annotated row of these runs of chunks is rejected, (N,) uint8: a place in REASONS, or KEPT. workers None: in this process."""
    calls = [(config, chunks, task, scratch) for chunks in runs]
    parts = each(judge, calls, workers, "annotate: rows", by_reference=True)
    found: np.ndarray = each(resolve, [(parts, config.near_duplicates)], workers, "annotate: duplicates")[0]
    return found


def runs_of(chunks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Chunks in runs of about RUN_ROWS rows, in their order."""
    runs: list[list[dict[str, Any]]] = []
    rows = RUN_ROWS
    for chunk in chunks:
        if rows >= RUN_ROWS:
            runs.append([])
            rows = 0
        runs[-1].append(chunk)
        rows += chunk["rows"]
    return runs


def part_name(chunk: dict[str, Any]) -> str:
    return f"part-{chunk['part']:05d}.parquet"
