"""A process that forks others which edit a run until they are killed. Forking is quick; starting Python and torch two hundred times is not.

Reads lines `RUN SEED LOG`, answers each with the pid of a new process, and goes on when that one is gone. The new process does random edits,
and writes to LOG, before each, what it is about to do, and after each, that it was told it is done.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

import faiss
import numpy as np
import torch

from making.tiny_run import WORDS
from retrikt_ray.index.learning import of_texts
from retrikt_ray.index.vectors import StudentVectors
from retrikt_ray.index.words.postings import counted
from retrikt_ray.knowledge.compact import compact
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.runtime.folders import Folder


def choose(rng: random.Random, ids: list[str], labels: list[str]) -> dict[str, Any]:
    """The next edit."""
    kind = rng.choices(["add", "update", "delete", "compact"], [5, 2, 3, 2])[0]
    if kind in ("update", "delete") and len(ids) < 6:
        kind = "add"
    if kind == "add":
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(rng.randint(1, 3))]
        return {"kind": kind, "rows": [{"id": f"new-{rng.getrandbits(48):012x}", "text": t, "label": rng.choice(labels)} for t in texts]}
    if kind == "update":
        rows = [{"id": i, "label": rng.choice(labels)} for i in rng.sample(ids, rng.randint(1, 2))]
        if rng.random() < 0.5:
            rows[0]["text"] = " ".join(rng.choices(WORDS, k=5))
        return {"kind": kind, "rows": rows}
    return {"kind": kind, "ids": rng.sample(ids, rng.randint(1, 2))} if kind == "delete" else {"kind": kind}


def work(run: Folder, seed: int, log: str) -> None:
    """Edit until killed."""
    rng, knowledge = random.Random(seed), Knowledge.open(run)

    def tell(line: str) -> None:
        with open(log, "a") as file:
            file.write(line + "\n")
            file.flush()

    tell("open")
    while True:
        live = knowledge.view.rows["id"].to_pylist()
        edit = choose(rng, sorted(i for i, a in zip(live, knowledge.view.alive, strict=True) if a), list(knowledge.task.labels))
        tell(json.dumps(edit))
        if edit["kind"] == "compact":
            compact(run)
            knowledge.refresh()
        elif edit["kind"] == "delete":
            knowledge.delete(edit["ids"])
        else:
            getattr(knowledge, edit["kind"])(edit["rows"])
        tell("done")


if __name__ == "__main__":
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    counted([("a film", None)])  # imports what is imported late, and so does the next line
    of_texts([("a film", None)], np.ones((1, 2)))
    for line in sys.stdin:
        where, number, name = line.split()
        StudentVectors(Folder.at(where) / "student", 0, 1).load()  # once for all: it takes longer than an edit
        pid = os.fork()
        if pid == 0:
            work(Folder.at(where), int(number), name)
        print(pid, flush=True)
        os.waitpid(pid, 0)
