"""Stage 5, annotate: the teacher labels and embeds every text; what is not good enough is kept apart with its reason.

Three sources become rows of one store: generated texts, the labelled task rows, and unlabelled texts of the domain. Annotators run in a
Ray Data actor pool, shard by shard, each writing one atomic file. Filters that look at the whole store (duplicates, leakage) run after,
over hashes alone, so that their answer does not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from retrikt_ray.runtime.cluster import plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import ConfigError, Scaled

VERSION = 1
CHUNK = 512  # rows per annotated part


class AnnotateConfig(Scaled):
    """Which texts become rows of the store."""

    batch: int = Field(64, ge=1, description="Texts per forward pass of the annotator.")
    min_words: int = Field(2, ge=1, description="Texts with fewer words are rejected (`too_short`).")
    keep_unfinished: bool = Field(
        True, description="Keep generated texts that the length limit cut off; else they are rejected (`unfinished`)."
    )
    min_confidence: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Generated and unlabelled texts whose top probability is lower are rejected (`low_confidence`). 0: off.",
    )
    require_agreement: bool = Field(
        False, description="Reject generated texts that the teacher labels otherwise than asked (`label_disagreement`)."
    )


def store_schema(width: int) -> pa.Schema:
    """The store's columns; `width` is the size of the teacher's embedding."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("text", pa.string()),
            ("text_pair", pa.string()),
            ("asked_label", pa.string()),  # the condition of a generated text, the true label of a task row, else null
            ("condition", pa.int32()),
            ("value", pa.float64()),  # true class id or number of a task row, else null
            ("teacher_probs", pa.list_(pa.float32())),  # class probabilities, or one value in regression
            ("teacher_embedding", pa.list_(pa.float32(), width)),
            ("source", pa.string()),  # generated | task | unlabelled | added
            ("created_by", pa.string()),  # content digest of the generated artifact
        ]
    )


def key(text: str, text_pair: str | None) -> str:
    """Equal for texts that differ only in case, spacing and punctuation; a hash, so that a store's keys fit in memory."""
    plain = "\x1f".join(letters(part) or part for part in (text, text_pair or ""))
    return hashlib.blake2b(plain.encode(), digest_size=12).hexdigest()


def letters(text: str) -> str:
    """Letters, numbers and combining marks (the vowel signs of many scripts) in lower case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(c)[0] in "LNM")


def has_text(row: dict[str, Any]) -> bool:
    """False for an empty text, and for a pair that lacks a side."""
    return bool(row["text"]) and row["text_pair"] != ""


class PartWriter:
    """A Ray Data actor: holds the annotator and turns source chunks into annotated parts."""

    def __init__(self, section: dict[str, Any], teacher_uri: str, scratch_uri: str, threads: int) -> None:
        import torch

        from retrikt_ray.teacher.annotator import Classifier

        torch.set_num_threads(threads)
        self.config, self.scratch = AnnotateConfig(**section), Folder(scratch_uri)
        self.model = Classifier.load(Folder(teacher_uri))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        counts = [
            self.write(int(p), str(u), str(n), int(s))
            for p, u, n, s in zip(*(batch[k] for k in ("part", "uri", "name", "start")), strict=True)
        ]
        return {"rows": counts}

    def write(self, part: int, uri: str, name: str, start: int) -> int:
        """Annotate rows start .. start + CHUNK of one source file."""
        rows = Folder(uri).read_table(name).slice(start, CHUNK).to_pylist()
        usable = [r for r in rows if has_text(r)]
        out = []
        if usable:
            probs, embeddings = self.model.annotate([(r["text"], r["text_pair"]) for r in usable], self.config.batch)
            out = [r | {"probs": p, "embedding": e} for r, p, e in zip(usable, probs.tolist(), embeddings.tolist(), strict=True)]
        empty = [r | {"probs": None, "embedding": None} for r in rows if not has_text(r)]
        schema = pa.schema(
            [(f, t) for f, t in (("id", pa.string()), ("text", pa.string()), ("text_pair", pa.string()), ("condition", pa.int32()))]
            + [("value", pa.float64()), ("finished", pa.bool_()), ("probs", pa.list_(pa.float32())), ("embedding", pa.list_(pa.float32()))]
        )
        self.scratch.write_table(
            f"part-{part:05d}.parquet", pa.Table.from_pylist([{n: r.get(n) for n in schema.names} for r in out + empty], schema=schema)
        )
        return len(rows)


def sources(inputs: dict[str, Folder]) -> list[dict[str, Any]]:
    """Chunks of all source files, in the order in which duplicates are resolved: task rows first, generated ones last."""
    import pyarrow.parquet as pq

    chunks: list[dict[str, Any]] = []
    files = [(inputs["task"], "train.parquet", "task"), (inputs["task"], "unlabelled.parquet", "unlabelled")]
    files += [(inputs["generated"], n, "generated") for n in inputs["generated"].files() if n.startswith("part-")]
    for folder, name, source in files:
        count = pq.read_metadata(pa.BufferReader(folder.read_bytes(name))).num_rows
        for start in range(0, count, CHUNK):
            chunks.append(
                {"part": len(chunks), "uri": folder.uri, "name": name, "start": start, "source": source, "rows": min(CHUNK, count - start)}
            )
    return chunks


def reject_reason(row: dict[str, Any], source: str, held_out: set[str], seen: set[str], config: AnnotateConfig) -> str | None:
    """Why a row does not enter the store, or None. The first that applies, in this order."""
    if not has_text(row):
        return "empty"
    code = key(row["text"], row["text_pair"])
    if code in held_out:
        return "leakage"
    if source != "task" and len(row["text"].split()) < config.min_words:
        return "too_short"
    if source == "generated" and not row["finished"] and not config.keep_unfinished:
        return "unfinished"
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

    1. Annotate what an interrupted run left undone.  2. Decide row by row, in source order.  3. Write and count.
    """
    # 1. annotate
    scratch, task = out["scratch"], inputs["task"].read_json("task.json")
    chunks = sources(inputs)
    there = set(scratch.files())
    missing = [c for c in chunks if f"part-{c['part']:05d}.parquet" not in there]
    if missing:
        import ray.data

        workers = plan(config, "annotate")
        done = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
            PartWriter,
            fn_constructor_args=(config.model_dump(), inputs["teacher"].uri, scratch.uri, workers.threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers.count, len(missing))),
            num_cpus=workers.cpus,
            num_gpus=workers.gpus or None,
        )
        with track("annotate", sum(c["rows"] for c in missing), "rows") as progress:
            for row in done.iter_rows():
                progress.advance(int(row["rows"]))

    # 2. decide
    held_out = {
        key(t, p)
        for split in ("validation", "test")
        for t, p in zip(
            *(inputs["task"].read_table(f"{split}.parquet", ["text", "text_pair"])[c].to_pylist() for c in ("text", "text_pair")),
            strict=True,
        )
    }
    seen: set[str] = set()
    reasons: Counter[str] = Counter()
    by_source: Counter[str] = Counter()
    created_by = inputs["generated"].read_json("manifest.json")["fingerprint"][:16]
    width = 0
    for chunk in chunks:
        kept, rejected = [], []
        for row in scratch.read_table(f"part-{chunk['part']:05d}.parquet").to_pylist():
            reason = reject_reason(row, chunk["source"], held_out, seen, config)
            record = {
                "id": row["id"],
                "text": row["text"],
                "text_pair": row["text_pair"],
                "condition": row["condition"],
                "value": row["value"],
                "asked_label": None if row["condition"] is None else task["conditions"][row["condition"]],
                "teacher_probs": row["probs"],
                "teacher_embedding": row["embedding"],
                "source": chunk["source"],
                "created_by": created_by,
            }
            if reason:
                reasons[reason] += 1
                rejected.append(record | {"reason": reason})
            else:
                by_source[chunk["source"]] += 1
                kept.append(record)
        # 3. write
        width = width or len(
            next(r["teacher_embedding"] for r in kept + rejected if r["teacher_embedding"])
        )  # task rows come first and have text
        schema = store_schema(width)
        name = f"part-{chunk['part']:05d}.parquet"
        out["store"].write_table(name, pa.Table.from_pylist(kept, schema=schema))
        out["rejected"].write_table(name, pa.Table.from_pylist(rejected, schema=schema.append(pa.field("reason", pa.string()))))
    if not by_source:
        raise ConfigError(f"the store would be empty: all rows were rejected ({dict(reasons)}); loosen the keys of `annotate:`")
    card = {"kept": sum(by_source.values()), "by_source": dict(by_source), "rejected": dict(reasons)}
    generated = sum(c["rows"] for c in chunks if c["source"] == "generated")
    out["store"].write_json("store.json", card | {"generated": generated})
    return {"kept": card["kept"], "rejected": sum(reasons.values())} | ({"reasons": dict(reasons)} if reasons else {})
