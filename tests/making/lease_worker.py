"""A process that forks writers of a run on S3: editors of its store, or drivers. Forking is quick; starting Python and torch hundreds of times is not.

Reads lines of JSON {kind, uri, number, log, far, ...}, and answers each with the pid of a new process, which writes to LOG what it is about to do and
what it was told. far: others take it for a process of another machine, whose death nobody sees. Leases last two seconds here.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

from making.kill_worker import choose
from retrikt_ray import pipeline
from retrikt_ray.config import parse
from retrikt_ray.knowledge import log
from retrikt_ray.knowledge.compact import compact
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.pipeline import Stage
from retrikt_ray.runtime import cluster
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.leases import lease
from retrikt_ray.runtime.leases.lease import LeaseHeld, LeaseLost

PARTS = 6  # of a made-up stage's output


class Told:
    """A log that another process reads while this one may be killed."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, kind: str, value: Any = None) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps([kind, value]) + "\n")


def short(far: bool, number: int) -> None:
    """Leases of two seconds; of a holder that is far, nobody sees that it is dead."""
    lease.LEASE_S, lease.TRUST_S, lease.BEAT_S, lease.POLL_S = 2.0, 1.3, 0.4, 0.05
    mine = lease.myself() | {"command": f"writer {number}"} | ({"process": None} if far else {})
    lease.myself = lambda: mine  # type: ignore[attr-defined]


# -- editors -----------------------------------------------------------------------------------------------------------


def edit(uri: str, number: int, tell: Told, seed: int, wait_s: float) -> None:
    """Edit rows of one's own until killed: those that this writer added, and every other one of the first twelve."""
    rng, knowledge = random.Random(seed), Knowledge.open(Folder.at(uri))
    log.WAIT_S = wait_s
    tell("open")
    while True:
        live = [i for i, alive in zip(knowledge.view.rows["id"].to_pylist(), knowledge.view.alive, strict=True) if alive]
        ids = sorted(i for i in live if i.startswith(f"w{number}-") or (i.startswith("train-") and int(i[6:]) % 2 == number))
        made = choose(rng, ids, list(knowledge.task.labels))
        for row in made.get("rows", []):
            row["id"] = row["id"].replace("new-", f"w{number}-")
        tell("about to", made)
        try:
            if made["kind"] == "compact":
                compact(Folder.at(uri))
                knowledge.refresh(at_once=True)
            elif made["kind"] == "delete":
                knowledge.delete(made["ids"])
            else:
                getattr(knowledge, made["kind"])(made["rows"])
            tell("done")
        except LeaseHeld as error:
            tell("refused", str(error))
        except LeaseLost as error:
            tell("lost", str(error))
        knowledge.refresh(at_once=True)


# -- drivers -----------------------------------------------------------------------------------------------------------


def made_up(name: str, number: int) -> Any:
    """A stage that needs no Ray: some files that follow from its config, slowly; those that are there are not made again."""

    def work(config: Any, inputs: dict[str, Folder], outputs: dict[str, Folder], seed: int) -> dict[str, Any]:
        for output in [o for n, o in outputs.items() if n != "scratch"]:
            for part in range(PARTS):
                if not output.exists(f"part-{part}"):
                    time.sleep(0.12)
                    output.write_bytes(f"part-{part}", part_of(output.uri.rsplit("/", 1)[1], config.model_dump(mode="json"), part))
        return {"writer": number}

    return SimpleNamespace(VERSION=1, **{name: work})


def part_of(output: str, config: dict[str, Any], part: int) -> bytes:
    return json.dumps([output, part, config]).encode()


class MadeUp(Stage):
    def module(self) -> Any:
        return super().module() if self.name == "prepare" else made_up(self.name, NUMBER)


NUMBER = 0  # of this process's writer


def drive(uri: str, number: int, tell: Told, config: str) -> None:
    """A run of prepare, which is real, and two stages that are not."""
    global NUMBER
    NUMBER = number
    pipeline.STAGES = (
        MadeUp("task", "prepare", "", (), ("task",)),
        MadeUp("store", "generate", "", ("task",), ("generated",)),
        MadeUp("store", "annotate", "", ("generated",), ("store", "rejected")),
    )
    pipeline.BY_NAME = {stage.name: stage for stage in pipeline.STAGES}
    pipeline.MADE_BY = {output: stage for stage in pipeline.STAGES for output in stage.outputs}
    cluster.connect = lambda *_: None  # type: ignore[assignment]
    pipeline.preflight = lambda _: None
    tell("open")
    try:
        pipeline.run(parse(config, "drill"), uri)
        tell("done")
    except LeaseHeld as error:
        tell("refused", str(error))
    except LeaseLost as error:
        tell("lost", str(error))
    except BaseException as error:
        tell("failed", repr(error))
        raise


def start(order: dict[str, Any]) -> None:
    kind, number, tell = order.pop("kind"), order["number"], Told(order.pop("log"))
    short(order.pop("far"), number)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    {"edit": edit, "drive": drive}[kind](tell=tell, **order)


if __name__ == "__main__":
    import faiss
    import numpy as np
    import torch

    from retrikt_ray.index.learning import of_texts
    from retrikt_ray.index.words.postings import counted

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    counted([("a film", None)])  # imports what is imported late, and so does the next line
    of_texts([("a film", None)], np.ones((1, 2)))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                start(json.loads(line))
            finally:
                os._exit(0)
        print(pid, flush=True)
