"""Stage 6, annotate: the teacher labels and embeds every text; what is not good enough is kept apart with its reason.

Four sources become rows of one store: the labelled task rows, unlabelled texts of the domain, passages of a corpus, and generated texts. Annotators run in a
Ray Data actor pool, shard by shard, each writing one atomic file. Filters that look at the whole store (duplicates, leakage; `duplicates.py`) run
after, over hashes alone, so that their answer does not depend on the number of workers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from retrikt_ray.runtime.cluster import plan, pool
from retrikt_ray.runtime.folders import MANIFEST, Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import ConfigError, Scaled
from retrikt_ray.store.duplicates import HeldOut, key, near_duplicates, shingles
from retrikt_ray.store.rows import ANNOTATED, Row, rejected_schema, store_schema, table_of
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import texts_of
from retrikt_ray.task.words import words

VERSION = 3
CHUNK = 512  # rows per annotated part
PARTS = {"harvested": "corpus", "generated": "generated"}  # artifact with texts -> what their source is called
READ = ["text", "text_pair", "condition", "finished", "error", "probs"]  # what a decision looks at


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


class PartWriter:
    """A Ray Data actor: holds the annotator and turns source chunks into annotated parts."""

    def __init__(self, config: AnnotateConfig, teacher: Folder, scratch: Folder, threads: int) -> None:
        import torch

        from retrikt_ray.teacher.annotator import Annotator

        torch.set_num_threads(threads)
        self.config, self.scratch = config, scratch
        self.annotator = Annotator.load(teacher)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        chunks = zip(*(batch[k] for k in ("part", "uri", "name", "start")), strict=True)
        return {"rows": [self.write(int(part), Folder(str(uri)), str(name), int(start)) for part, uri, name, start in chunks]}

    def write(self, part: int, source: Folder, name: str, start: int) -> int:
        """Annotate rows start .. start + CHUNK of one source file: those with a text first, then the empty ones."""
        rows = source.read_table(name).slice(start, CHUNK).to_pylist()
        usable, empty = [r for r in rows if has_text(r)], [r for r in rows if not has_text(r)]
        if usable:
            probs, embeddings = self.annotator.annotate([(r["text"], r["text_pair"]) for r in usable], self.config.batch)
            usable = [r | {"probs": p, "embedding": e} for r, p, e in zip(usable, probs.tolist(), embeddings.tolist(), strict=True)]
        records = [{name: r.get(name) for name in ANNOTATED.names} for r in usable + empty]
        self.scratch.write_table(f"part-{part:05d}.parquet", pa.Table.from_pylist(records, schema=ANNOTATED))
        return len(rows)


def sources(inputs: dict[str, Folder]) -> list[dict[str, Any]]:
    """Chunks of all source files, in the order in which duplicates are resolved: task rows first, generated ones last."""
    import pyarrow.parquet as pq

    chunks: list[dict[str, Any]] = []
    files = [(inputs["task"], "train.parquet", "task"), (inputs["task"], "unlabelled.parquet", "unlabelled")]
    for artifact, source in PARTS.items():
        if artifact in inputs:
            files += [(inputs[artifact], n, source) for n in inputs[artifact].files() if n.startswith("part-")]
    for folder, name, source in files:
        count = pq.read_metadata(pa.BufferReader(folder.read_bytes(name))).num_rows
        for start in range(0, count, CHUNK):
            chunks.append(
                {"part": len(chunks), "uri": folder.uri, "name": name, "start": start, "source": source, "rows": min(CHUNK, count - start)}
            )
    return chunks


def reject_reason(row: dict[str, Any], source: str, held_out: HeldOut, seen: set[str], config: AnnotateConfig) -> str | None:
    """Why a row does not enter the store, or None. The first that applies, in this order; near duplicates are found later, among the rows left."""
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
    code = key(*text)
    if code in seen:
        return "duplicate"
    if source != "task" and len(row["probs"]) > 1:
        if max(row["probs"]) < config.min_confidence:
            return "low_confidence"
        if source == "generated" and config.require_agreement and int(np.argmax(row["probs"])) != row["condition"]:
            return "label_disagreement"
    seen.add(code)
    return None


def annotate(config: AnnotateConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `store/` (kept rows) and `rejected/` (the others, with `reason`), part by part.

    1. Annotate what an interrupted run left undone.  2. Decide row by row, in source order.  3. Write, and count.
    """
    # 1. annotate
    scratch, chunks = out["scratch"], sources(inputs)
    complete = set(scratch.files())
    missing = [c for c in chunks if part_name(c) not in complete]
    if missing:
        workers = plan(config, "annotate")
        with track("annotate", sum(c["rows"] for c in missing), "rows") as progress:
            for row in pool(PartWriter, (config, inputs["teacher"], scratch, workers.threads), missing, workers):
                progress.advance(int(row["rows"]))

    # 2. decide
    reasons_of = decide(config, chunks, inputs["task"], scratch)

    # 3. write and count
    by_source, reasons = write(chunks, reasons_of, inputs, out)
    if not by_source:
        raise ConfigError(f"the store would be empty: all rows were rejected ({dict(reasons)}); loosen the keys of `annotate:`")
    kept = sum(by_source.values())
    generated = sum(c["rows"] for c in chunks if c["source"] == "generated")
    card = {"kept": kept, "by_source": dict(by_source), "rejected": dict(reasons), "generated": generated}
    out["store"].write_json("store.json", card)
    return {"kept": kept, "rejected": sum(reasons.values())} | ({"reasons": dict(reasons)} if reasons else {})


def decide(config: AnnotateConfig, chunks: list[dict[str, Any]], task: Folder, scratch: Folder) -> list[list[str | None]]:
    """Why each annotated row is rejected, or None, by chunk. A function of the rows and their order alone."""
    held_out = HeldOut([t for split in ("validation", "test") for t in texts_of(task.read_table(f"{split}.parquet"))])
    seen: set[str] = set()
    reasons: list[list[str | None]] = []
    rows, places, fixed = [], [], []  # what is left: shingles, (chunk, row in it), whether it is the task's own
    for number, chunk in enumerate(chunks):
        source = chunk["source"]
        records = scratch.read_table(part_name(chunk), READ).to_pylist()
        reasons.append([reject_reason(record, source, held_out, seen, config) for record in records])
        if config.near_duplicates < 1:
            for i, record in enumerate(records):
                if reasons[-1][i] is None:
                    rows.append(shingles((record["text"], record["text_pair"])))
                    places.append((number, i))
                    fixed.append(source == "task")
    for row in np.flatnonzero(near_duplicates(rows, np.array(fixed, bool), config.near_duplicates) >= 0):
        number, i = places[row]
        reasons[number][i] = "near_duplicate"
    return reasons


def part_name(chunk: dict[str, Any]) -> str:
    return f"part-{chunk['part']:05d}.parquet"


def write(
    chunks: list[dict[str, Any]], reasons_of: list[list[str | None]], inputs: dict[str, Folder], out: dict[str, Folder]
) -> tuple[Counter[str], Counter[str]]:
    """Write each annotated row to `store/` or `rejected/`. Returns the rows kept by source, and those rejected by reason."""
    task = Task.read(inputs["task"])
    made_by = {source: inputs[name].read_json(MANIFEST)["fingerprint"][:16] for name, source in PARTS.items() if name in inputs}
    by_source, reasons = Counter[str](), Counter[str]()
    width = 0
    for chunk, found in zip(chunks, reasons_of, strict=True):
        kept, rejected, why = [], [], []
        for record, reason in zip(out["scratch"].read_table(part_name(chunk)).to_pylist(), found, strict=True):
            row = store_row(record, chunk["source"], made_by.get(chunk["source"], made_by["generated"]), task)
            if reason:
                rejected.append(row)
                why.append({"reason": reason})
            else:
                kept.append(row)
            width = width or len(row.teacher_embedding or ())  # task rows come first and have text
        reasons.update(w["reason"] for w in why)
        by_source.update(row.source for row in kept)
        out["store"].write_table(part_name(chunk), table_of(kept, store_schema(width)))
        out["rejected"].write_table(part_name(chunk), table_of(rejected, rejected_schema(width), why))
    return by_source, reasons


def store_row(record: dict[str, Any], source: str, created_by: str, task: Task) -> Row:
    """What the store says of an annotated row."""
    condition = record["condition"]
    return Row(
        id=record["id"],
        text=record["text"],
        text_pair=record["text_pair"],
        asked_label=None if condition is None else task.conditions[condition],
        condition=condition,
        value=record["value"],
        teacher_probs=record["probs"],
        teacher_embedding=record["embedding"],
        source=source,
        created_by=created_by,
    )
