"""Compaction: the edits of a run's knowledge become a new base, built as the index stage builds it.

Memory is bounded by a row group and the log. Readers go on with the old base until the manifest names the new one, in one rename; a process
that dies before leaves files that no manifest names. Vectors are made anew by today's student, so compaction also takes edits over to
a student that was trained since.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrikt_ray.index.build import IndexConfig, build_index
from retrikt_ray.index.learning import edited
from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.vectors import validation_vectors
from retrikt_ray.knowledge.base import learnt_from
from retrikt_ray.knowledge.log import Log, base_of, check_origin, read_edit, sweep, tagged_log, writing
from retrikt_ray.knowledge.view import labelled
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.cluster import Workers, each
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder, sealed
from retrikt_ray.runtime.tables import Source
from retrikt_ray.task.texts import TEXT_COLUMNS

PART_ROWS = 4096  # of the added rows in a new store


def compact(run: Folder, workers: Workers | None = None) -> Log | None:
    """Write a new base of the live rows and empty the log; None where there was nothing to do. workers None: in this process.

    1. Check what is there.  2. The live rows.  3. Their index.  4. From the old base to the new one, at once.
    """
    folder = run / "knowledge"
    with writing(run) as right:
        # 1. check
        log, tag = tagged_log(folder, right)
        student = check(run / "student", deep=True).content
        if log is None:
            return None
        check_origin(run, log)
        where, began = base_of(run, log), time.time()
        configs = [check(f / "index").config for f in (run, where)]  # the run's own index may have been made anew
        if not log.edits and log.contents["student"] == student and configs[0] == configs[1]:
            return None
        sweep(folder, log, right)
        seal = check(where / "store", deep=True)
        if seal.content != log.contents["store"]:
            raise ArtifactError(f"{where}/store is not the store that {folder}/{MANIFEST} names")
        base = folder / f"base-{log.version + 1:06d}{right.mark}"
        config = IndexConfig(**configs[0])
        more: Any = {"stage": "compact", "fingerprint": f"{log.contents['store'][:16]}+{log.version}", "seed": seal.seed}

        # 2. the live rows
        write_live(where / "store", [read_edit(folder, e) for e in log.edits], base / "store")
        stored = artifacts.seal(base / "store", config={}, inputs={"store": seal.content}, started=began, **more).content

        # 3. their index
        threads = workers.threads if workers else 1
        queries = each(validation_vectors, [(run / "task", run / "student", threads)], workers, "compact: validation")[0]
        sources = learnt_from((where / "index").read_json("index.json"))
        memory = memory_after(where, [read_edit(folder, e) for e in log.edits], sources)
        rest: Any = {"seed": seal.seed, "workers": workers, "memory": memory, "sources": sources}
        build_index(config, base / "store", run / "student", base / "index", queries, **rest)
        inputs = {"task": check(run / "task").content, "store": stored, "student": student}
        indexed = artifacts.seal(base / "index", config=config.fingerprint_view(), inputs=inputs, started=began, **more).content

        # 4. at once
        contents = {"student": student, "store": stored, "index": indexed}
        after = Log(log.version + 1, base.uri.rsplit("/", 1)[1], contents, log.origin, previous=log.base)
        right.write(folder, MANIFEST, sealed(asdict(after)), tag)
        sweep(folder, after, right)
        return after


def memory_after(base: Folder, edits: list[pa.Table], sources: list[str]) -> Memory:
    """The n-gram memory of a base, which has learnt from these sources, with the edits learnt, as a view of them has it."""
    memory = Memory.unsealed(base / "index")
    if not edits:
        return memory
    table, source = pa.concat_tables(edits), Source.of(base / "store")
    gone = table.filter(table["deleted"])["position"].combine_chunks()
    new = table.filter(pc.invert(table["deleted"]))
    new = new.filter(pc.invert(pc.is_in(new["position"], gone)))
    lost = []
    for first, rows in source.read(0, source.rows, (*TEXT_COLUMNS, "teacher_probs", "source")):
        lost.append(rows.filter(pc.is_in(pa.array(range(first, first + len(rows)), pa.int64()), gone)))
    return edited(memory, labelled(new), labelled(pa.concat_tables(lost), sources))


def write_live(store: Folder, edits: list[pa.Table], out: Folder) -> None:
    """The rows of a store that the edits do not delete, in their order, a row group at a time; then the rows that it adds."""
    source = Source.of(store)
    columns = source.schema.names
    table = pa.concat_tables(edits) if edits else None
    gone = pa.array([] if table is None else table.filter(table["deleted"])["position"].to_pylist(), pa.int64())
    parts = 0

    def write(rows: pa.Table) -> None:
        nonlocal parts
        if len(rows):
            out.write_table(f"part-{parts:05d}.parquet", rows)
            parts += 1

    for first, rows in source.read(0, source.rows, tuple(columns)):
        write(rows.filter(pc.invert(pc.is_in(pa.array(range(first, first + len(rows)), pa.int64()), gone))))
    if table is not None:
        new = table.filter(pc.invert(table["deleted"]))
        new = new.filter(pc.invert(pc.is_in(new["position"], gone)))
        for start in range(0, len(new), PART_ROWS):
            write(new.select(columns).slice(start, PART_ROWS))
