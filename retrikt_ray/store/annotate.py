"""Stage 6, annotate: the teacher labels and embeds every text; what is not good enough is kept apart with its reason.

Four sources become rows of one store: the labelled task rows, unlabelled texts of the domain, passages of a corpus, and generated texts. Annotators run in a
Ray Data actor pool, chunk by chunk, each writing one atomic file among the scratch of the run. What enters the store is decided after (`decide.py`),
over the whole store in a fixed order, so that it does not depend on the number of workers. The files of the store are large: a part is what a task
decides and writes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from retrikt_ray.runtime.cluster import Workers, each, plan, pool
from retrikt_ray.runtime.folders import MANIFEST, Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.runtime.tables import writing
from retrikt_ray.store.decide import KEPT, REASONS, AnnotateConfig, decide, has_text, part_name, runs_of
from retrikt_ray.store.rows import ANNOTATED, Row, rejected_schema, store_schema, table_of
from retrikt_ray.task.card import Task

VERSION = 4
CHUNK, LEAST, CHUNKS = (
    512,
    64,
    48,
)  # rows that an annotator is handed at a time: at most, at least, and of a small store so that there are so many times
PARTS = {"harvested": "corpus", "generated": "generated"}  # artifact with texts -> what their source is called


class PartWriter:
    """A Ray Data actor: holds the annotator and turns source chunks into annotated parts."""

    def __init__(self, config: AnnotateConfig, teacher: Folder, scratch: Folder, threads: int) -> None:
        import torch

        from retrikt_ray.teacher.annotator import Annotator

        torch.set_num_threads(threads)
        self.config, self.scratch = config, scratch
        self.annotator = Annotator.load(teacher)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        chunks = zip(*(batch[k] for k in ("part", "uri", "name", "start", "rows")), strict=True)
        return {
            "rows": [self.write(int(part), Folder(str(uri)), str(name), int(start), int(rows)) for part, uri, name, start, rows in chunks]
        }

    def write(self, part: int, source: Folder, name: str, start: int, count: int) -> int:
        """Annotate `count` rows of one source file, from `start`: those with a text first, then the empty ones."""
        rows = rows_at(source, name, start, count).to_pylist()
        usable, empty = [r for r in rows if has_text(r)], [r for r in rows if not has_text(r)]
        if usable:
            probs, embeddings = self.annotator.annotate([(r["text"], r["text_pair"]) for r in usable], self.config.batch)
            usable = [r | {"probs": p, "embedding": e} for r, p, e in zip(usable, probs.tolist(), embeddings.tolist(), strict=True)]
        records = [{name: r.get(name) for name in ANNOTATED.names} for r in usable + empty]
        self.scratch.write_table(part_name(part), pa.Table.from_pylist(records, schema=ANNOTATED))
        return len(rows)


def rows_at(folder: Folder, name: str, start: int, count: int) -> pa.Table:
    """Some rows of a file, of which no more row groups are read than they lie in."""
    with folder.parquet(name) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        first, last = np.searchsorted(ends, (start, start + count - 1), "right")
        before = int(ends[first - 1]) if first else 0
        return file.read_row_groups(list(range(first, last + 1))).slice(start - before, count)


def chunk_rows(total: int) -> int:
    """Rows that an annotator is handed at a time, and of a row group of the store: few of a small one, so that its workers end together."""
    return min(CHUNK, max(LEAST, total // CHUNKS))


def sources(inputs: dict[str, Folder]) -> list[dict[str, Any]]:
    """Chunks of all source files, in the order in which duplicates are resolved: task rows first, generated ones last."""
    sizes = {artifact: inputs[artifact].sizes() for artifact in ("task", *PARTS) if artifact in inputs}
    files = [("task", "train.parquet", "task"), ("task", "unlabelled.parquet", "unlabelled")]
    for artifact, source in PARTS.items():
        files += [(artifact, name, source) for name in sorted(sizes.get(artifact, ())) if name.startswith("part-")]
    counts = []
    for artifact, name, _ in files:
        with inputs[artifact].parquet(name, sizes[artifact][name]) as file:
            counts.append(file.metadata.num_rows)
    size = chunk_rows(sum(counts))
    chunks: list[dict[str, Any]] = []
    for (artifact, name, source), count in zip(files, counts, strict=True):
        for start in range(0, count, size):
            where = {"uri": inputs[artifact].uri, "name": name, "start": start, "source": source, "rows": min(size, count - start)}
            chunks.append({"part": len(chunks)} | where)
    return chunks


def annotate(config: AnnotateConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `store/` (kept rows) and `rejected/` (the others, with `reason`), part by part.

    1. Annotate what an interrupted run left undone.  2. Decide row by row, in source order.  3. Write, and count.
    """
    # 1. annotate
    scratch, chunks, workers = out["scratch"], sources(inputs), plan(config, "annotate")
    complete = set(scratch.files())
    missing = [c for c in chunks if part_name(c["part"]) not in complete]
    if missing:
        with track("annotate", sum(c["rows"] for c in missing), "rows") as progress:
            for row in pool(PartWriter, (config, inputs["teacher"], scratch, workers.threads), missing, workers):
                progress.advance(int(row["rows"]))

    # 2. decide
    runs = runs_of(chunks, width := width_of(scratch))
    several = workers if len(runs) > 1 else None  # of one run tasks would take longer to start than it takes
    reasons_of = decide(config, runs, inputs["task"], scratch, several)

    # 3. write and count
    by_source, reasons = write(runs, reasons_of, inputs, out, width, several)
    if not by_source:
        raise ConfigError(f"the store would be empty: all rows were rejected ({dict(reasons)}); loosen the keys of `annotate:`")
    kept = sum(by_source.values())
    generated = sum(c["rows"] for c in chunks if c["source"] == "generated")
    card = {"kept": kept, "by_source": dict(by_source), "rejected": dict(reasons), "generated": generated}
    out["store"].write_json("store.json", card)
    return {"kept": kept, "rejected": sum(reasons.values())} | ({"reasons": dict(reasons)} if reasons else {})


def width_of(scratch: Folder) -> int:
    """Of the teacher's embeddings, as the first part has them: task rows come first and have text."""
    values = scratch.read_table(part_name(0), ["embedding"])["embedding"].to_pylist()
    return next((len(value) for value in values if value is not None), 0)


def write(
    runs: list[list[dict[str, Any]]],
    reasons_of: np.ndarray,
    inputs: dict[str, Folder],
    out: dict[str, Folder],
    width: int,
    workers: Workers | None,
) -> tuple[Counter[str], Counter[str]]:
    """Write each annotated row to `store/` or `rejected/`, a part for each run. Returns the rows kept by source, and those rejected by reason.

    reasons_of: as `decide` gives them. width: of the teacher's embeddings. workers None: in this process.
    """
    cuts = np.cumsum([sum(chunk["rows"] for chunk in chunks) for chunks in runs])[:-1]
    calls = [(i, chunks, some, inputs, out, width) for i, (chunks, some) in enumerate(zip(runs, np.split(reasons_of, cuts), strict=True))]
    by_source, reasons = Counter[str](), Counter[str]()
    for kept, rejected in each(write_run, calls, workers, "annotate: store"):
        by_source.update(kept)
        reasons.update(rejected)
    return by_source, reasons


def write_run(
    number: int, chunks: list[dict[str, Any]], reasons_of: np.ndarray, inputs: dict[str, Folder], out: dict[str, Folder], width: int
) -> tuple[Counter[str], Counter[str]]:
    """`write` of one run of chunks, a row group for each of them (a Ray task)."""
    task = Task.read(inputs["task"])
    made_by = {source: inputs[name].read_json(MANIFEST)["fingerprint"][:16] for name, source in PARTS.items() if name in inputs}
    by_source, reasons, codes = Counter[str](), Counter[str](), iter(reasons_of.tolist())
    schema, others = store_schema(width), rejected_schema(width)
    with writing(out["store"], part_name(number), schema) as store, writing(out["rejected"], part_name(number), others) as aside:
        for chunk in chunks:
            kept, rejected, why = [], [], []
            for record in out["scratch"].read_table(part_name(chunk["part"])).to_pylist():
                row, code = store_row(record, chunk["source"], made_by.get(chunk["source"], made_by["generated"]), task), next(codes)
                if code == KEPT:
                    kept.append(row)
                else:
                    rejected.append(row)
                    why.append({"reason": REASONS[code]})
            reasons.update(w["reason"] for w in why)
            by_source.update(row.source for row in kept)
            if kept:
                store.write_table(table_of(kept, schema))
            if rejected:
                aside.write_table(table_of(rejected, others, why))
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
