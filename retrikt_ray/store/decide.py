"""Why annotated rows do not enter the store: what speaks against a row by itself, and what the whole store does, which are duplicates.

All is found by tasks side by side. The first run by run of chunks; equal texts by the hash of their keys. Rows that may be near each other fall into
one bucket of a band of their hashes, and what hangs together by such buckets is gone through by one task, whatever happens elsewhere: so what is
decided is a function of the rows and their order alone, and is what one walk over all rows would decide. A task pulls what it wants of each run in
turn; the most that one holds is some 60 bytes for each row of the store, where the buckets of a band are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pydantic import Field

from retrikt_ray.runtime.cluster import Workers, each, fetched
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import Scaled
from retrikt_ray.store.duplicates import BANDS, HeldOut, Ragged, band_keys, components, key, near_duplicates, repeated, shingles
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
RUN_BYTES = 128e6  # of a part of the store, which is what a task decides and writes
RUNS, RUN_ROWS = 8, 10_000  # parts that tasks can share: of a store that would have fewer there are so many, but not of fewer rows
ROW_BYTES = 200  # of the store, beside its embedding
SHARE_ROWS = 250_000  # of the store, for each task that compares rows with others


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
        [judged(scratch.read_table(part_name(chunk["part"]), READ).to_pylist(), chunk["source"], held_out, config) for chunk in chunks]
    )


def placed(parts: Iterable[Judged]) -> Iterator[tuple[int, Judged]]:
    """Each part, and the number of its first row."""
    first = 0
    for part in parts:
        yield first, part
        first += len(part.reasons)


def equal(parts: Iterable[Judged], share: int, shares: int) -> np.ndarray:
    """Of the rows whose keys are of this share, numbers of those that say what an earlier one says, (n,) (a Ray task)."""
    keys, rows, counts = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    for first, part in placed(parts):
        mine = np.flatnonzero((part.reasons >= LOW) & (part.keys[:, 0] % np.uint64(shares) == share))
        keys.append(part.keys[mine])
        rows.append(first + mine)
        counts.append(part.reasons[mine] == KEPT)  # a row that is rejected for its label keeps no later one out
    return np.asarray(np.concatenate(rows)[repeated(np.concatenate(keys), np.concatenate(counts))])


def settled(parts: Iterable[Judged], equals: Iterable[np.ndarray]) -> np.ndarray:
    """Why each row is rejected but for near duplicates, (N,) uint8 (a Ray task)."""
    reasons = np.concatenate([np.zeros(0, np.uint8), *(part.reasons.copy() for part in parts)])
    for rows in equals:
        reasons[rows] = DUPLICATE
    return reasons


def linked(parts: Iterable[Judged], reasons: Sequence[np.ndarray], band: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept rows that follow each other in a bucket of this band: numbers of the ones and of the others, each (n,) (a Ray task). reasons: of `settled`."""
    keys, rows, of_all = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], reasons[0]
    for first, part in placed(parts):
        hashed = np.flatnonzero(part.sizes)
        kept = of_all[first + hashed] == KEPT
        keys.append(part.bands[kept, band])
        rows.append(first + hashed[kept])
    found, numbers = np.concatenate(keys), np.concatenate(rows)
    order = np.argsort(found, kind="stable")
    same = found[order[1:]] == found[order[:-1]]
    return numbers[order[:-1][same]], numbers[order[1:][same]]


def grouped(links: Iterable[tuple[np.ndarray, np.ndarray]], rows: int, shares: int) -> list[np.ndarray]:
    """By share, the numbers, sorted, of rows that hang together by links; of about as many rows each (a Ray task)."""
    labels = components(links, rows)
    several = np.flatnonzero(np.bincount(labels, minlength=1)[labels] > 1)
    members = several[np.argsort(labels[several], kind="stable")]
    begins = np.unique(labels[members], return_index=True)[1]
    cuts = np.searchsorted(begins * shares // max(1, len(members)), np.arange(1, shares))
    return [np.sort(part) for part in np.split(members, np.append(begins, len(members))[cuts])]


def near(parts: Iterable[Judged], groups: Sequence[list[np.ndarray]], share: int, threshold: float) -> np.ndarray:
    """Of the rows of a share of `grouped`, numbers of those that nearly equal an earlier one, (n,) (a Ray task)."""
    rows, texts, bands, own = groups[0][share], [], [np.zeros((0, BANDS), np.uint64)], [np.zeros(0, bool)]
    for first, part in placed(parts):
        low, high = np.searchsorted(rows, (first, first + len(part.reasons)))
        mine = rows[low:high] - first
        ends = np.cumsum(part.sizes)
        texts.append(Ragged.joined([Ragged(part.shingles, ends[mine] - part.sizes[mine], ends[mine])]))  # a copy: the part may go
        bands.append(part.bands[np.cumsum(part.sizes > 0)[mine] - 1])
        own.append(part.own[mine])
    return np.asarray(rows[near_duplicates(Ragged.joined(texts), np.concatenate(own), threshold, np.concatenate(bands)) >= 0])


def resolve(parts: list[Any], rows: int, threshold: float, workers: Workers | None, shares: int) -> np.ndarray:
    """Why each row is rejected, (N,) uint8, now that all are known. parts: `Judged`, or references to them; rows: in all.

    threshold: of near duplicates; 1: they are not looked for. shares: tasks that compare rows, which change nothing but the time.
    """

    def tasks(function: Any, calls: list[tuple[Any, ...]], label: str, by_reference: bool = True) -> list[Any]:
        return each(function, calls, workers, f"annotate: {label}", by_reference=by_reference)

    equals = tasks(equal, [(parts, share, shares) for share in range(shares)], "equal texts")
    whole = tasks(settled, [(parts, equals)], "reasons")
    found = [np.zeros(0, np.int64)]
    if threshold < 1:
        links = tasks(linked, [(parts, whole, band) for band in range(BANDS)], "likely pairs")
        groups = tasks(grouped, [(links, rows, shares)], "groups")
        found = tasks(near, [(parts, groups, share, threshold) for share in range(shares)], "near duplicates", by_reference=False)
    reasons = np.array(fetched(whole)[0])
    reasons[np.concatenate(found)] = NEAR
    return reasons


def decide(config: AnnotateConfig, runs: list[list[dict[str, Any]]], task: Folder, scratch: Folder, workers: Workers | None) -> np.ndarray:
    """Why each annotated row of these runs of chunks is rejected, (N,) uint8: a place in REASONS, or KEPT. workers None: in this process."""
    calls = [(config, chunks, task, scratch) for chunks in runs]
    parts = each(judge, calls, workers, "annotate: rows", by_reference=True)
    rows = sum(chunk["rows"] for chunks in runs for chunk in chunks)
    shares = max(1 if workers is None else workers.count, -(-rows // SHARE_ROWS))
    return resolve(parts, rows, config.near_duplicates, workers, shares)


def runs_of(chunks: list[dict[str, Any]], width: int) -> list[list[dict[str, Any]]]:
    """Chunks in runs, each to be a part of the store, in their order. width: of an embedding."""
    size = min(RUN_BYTES / (4 * width + ROW_BYTES), max(RUN_ROWS, sum(chunk["rows"] for chunk in chunks) / RUNS))
    runs: list[list[dict[str, Any]]] = []
    rows = 0
    for chunk in chunks:
        if not runs or rows >= size:
            runs.append([])
            rows = 0
        runs[-1].append(chunk)
        rows += chunk["rows"]
    return runs


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"
