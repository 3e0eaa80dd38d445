"""Two writers of one run on S3 (moto in a process of its own), killed or paused at moments drawn by seed: no update is lost, nothing is sealed twice.

Some rounds run with the suite, 50 of drivers and 50 of editors with `make drill-leases`.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from making.lease_worker import PARTS, part_of
from making.local_nodes import s3_server
from making.tasks import write_task
from making.tiny_run import LABELS, make_run

from retrikt_ray.config import parse
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.leases.conditional import get
from retrikt_ray.runtime.leases.holder import card_of

HERE = Path(__file__).parents[1]
ENV = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
HOLDER = re.compile(r"`writer \d` \(process \d+ on .+, since .+ UTC, for now until .+ UTC\)")
PAUSE_S = 3.0  # longer than a lease lasts
Rows = dict[str, tuple[str, str]]  # id -> text, label


@dataclass
class Drill:
    """A forker of writers, and a run on an S3 that keeps a journal."""

    forker: subprocess.Popen[str]
    journal: Path
    root: Path  # of the writers' logs
    name: str = ""  # of the run

    @property
    def uri(self) -> str:
        return f"s3://runs/{self.name}"

    def written(self) -> list[tuple[str, str]]:
        """Path below the run and contents of what was written, in order."""
        lines = [json.loads(line) for line in self.journal.read_text().splitlines()]
        prefix = f"/runs/{self.name}/"
        return [(w["path"].removeprefix(prefix), w["body"]) for w in lines if w["path"].startswith(prefix) and "body" in w]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    import s3fs

    root = tmp_path_factory.mktemp("drill")
    with s3_server(root / "journal") as settings:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        s3fs.S3FileSystem.clear_instance_cache()  # clients of another server
        worker = [sys.executable, str(HERE / "making" / "lease_worker.py")]
        forker = subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV | settings)
        yield Drill(forker, root / "journal", root)
        forker.kill()
        forker.communicate()
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def drill(server: Drill, tmp_path: Path, request: pytest.FixtureRequest) -> Drill:
    return replace(server, root=tmp_path, name=request.node.name)


class Writer:
    """A process that a forker started."""

    def __init__(self, drill: Drill, log: str, **order: Any) -> None:
        assert drill.forker.stdin is not None and drill.forker.stdout is not None
        self.log = drill.root / f"log-{log}"
        print(json.dumps({"uri": drill.uri, "log": str(self.log), **order}), file=drill.forker.stdin, flush=True)
        self.pid = int(drill.forker.stdout.readline())

    def told(self) -> list[tuple[str, Any]]:
        """What it wrote to its log; a line that it was writing when it was killed is not there."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]

    def count(self, *kinds: str) -> int:
        return sum(kind in kinds for kind, _ in self.told())

    @property
    def alive(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()

    def send(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        until(lambda: not self.alive)


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def strike(rng: random.Random, writers: list[Writer], counts: Counter[str], lease: tuple[Folder, str]) -> Writer:
    """Kill one of them, more often who holds the lease, or pause it for longer than its lease lasts. Answers the other one."""
    holder, (victim, other) = card_of(get(*lease)[0]), rng.sample(writers, 2)
    if rng.random() < 0.7 and not holder.get("free") and holder.get("pid") == other.pid:
        victim, other = other, victim
    counts["struck while holding"] += holder.get("pid") == victim.pid and not holder.get("free")
    if rng.random() < 0.6:
        victim.kill()
        counts["killed"] += 1
    else:
        victim.send(signal.SIGSTOP)
        time.sleep(PAUSE_S)
        victim.send(signal.SIGCONT)
        counts["paused"] += 1
    return other


def count_told(writers: list[Writer], counts: Counter[str]) -> None:
    for writer in writers:
        for kind, text in writer.told():
            if kind in ("refused", "lost"):
                counts[kind] += 1
                counts["told who holds it"] += bool(HOLDER.search(text))


# -- editors -----------------------------------------------------------------------------------------------------------


def live(knowledge: Knowledge) -> Rows:
    rows = [knowledge.view.row(int(p)) for p in np.flatnonzero(knowledge.view.alive)]
    return {r["id"]: (r["text"], LABELS[int(np.argmax(r["teacher_probs"]))]) for r in rows}


def owned(rows: Rows, number: int) -> Rows:
    """Those that a writer may edit."""
    return {i: r for i, r in rows.items() if i.startswith(f"w{number}-") or (i.startswith("train-") and int(i[6:]) % 2 == number)}


def after(rows: Rows, made: dict[str, Any]) -> Rows:
    out = dict(rows)
    for row in made.get("rows", []):
        out[row["id"]] = (row.get("text", rows.get(row["id"], ("", ""))[0]), row["label"])
    for code in made.get("ids", []):
        out.pop(code, None)
    return out


def possible(rows: Rows, told: list[tuple[str, Any]]) -> tuple[list[Rows], int, int]:
    """What a writer's rows may be after what it was told; how many of its edits are there for sure, and how many may be."""
    states, made, sure, maybe = [rows], None, 0, 0
    for kind, value in [*told, ("killed", None)]:
        if kind == "about to":
            made = value
        elif made is not None and kind == "done":
            states, sure, made = [after(s, made) for s in states], sure + 1, None
        elif made is not None and kind in ("lost", "killed"):
            states, maybe, made = [*states, *(after(s, made) for s in states)], maybe + 1, None
        elif kind == "refused":
            made = None
    return states, sure, maybe


def edit_again_and_again(drill: Drill, rounds: int) -> Counter[str]:
    rng, counts = random.Random(1), Counter[str]()
    run = make_run(drill.uri)
    rows, version = live(Knowledge.open(run)), 0
    for n in range(rounds):
        writers = [
            Writer(drill, f"{n}-{i}", kind="edit", number=i, far=rng.random() < 0.5, seed=2 * n + i, wait_s=wait_s)
            for i, wait_s in enumerate([0.5, 60.0])
        ]
        until(lambda: all(w.count("open") for w in writers))  # noqa: B023
        time.sleep(rng.uniform(0.1, 2))
        other = strike(rng, writers, counts, (run, "knowledge.lease.json"))
        before = other.count("done")
        until(lambda: other.count("done") > before)  # noqa: B023
        time.sleep(rng.uniform(0, 0.5))
        for writer in writers:
            writer.kill()
        predictor = Predictor.open(run)  # every checksum and every position is checked here
        there, now = live(predictor.knowledge), predictor.knowledge.view.version
        told = [possible(owned(rows, i), w.told()) for i, w in enumerate(writers)]
        for i, (states, _, _) in enumerate(told):
            assert owned(there, i) in states, f"round {n}, writer {i}"
        sure, maybe = (sum(t[k] for t in told) for k in (1, 2))
        idle = sum(
            made["kind"] == "compact" for w in writers for kind, made in w.told() if kind == "about to"
        )  # there may be nothing to do
        assert sure - idle <= now - version <= sure + maybe, f"round {n}: {now - version} versions, {sure} edits"
        counts["edits"] += sure
        count_told(writers, counts)
        rows, version = there, now
        counts["rounds"] += 1
    versions = [json.loads(body)["version"] for path, body in drill.written() if path == "knowledge/manifest.json"]
    assert [v for v in versions if v] == list(range(1, version + 1))  # each was written once, and over the one before
    counts["versions"] = version
    return counts


# -- drivers -----------------------------------------------------------------------------------------------------------


def drive_again_and_again(drill: Drill, rounds: int) -> Counter[str]:
    rng, counts = random.Random(2), Counter[str]()
    data, run = str(write_task(drill.root / "data")), Folder.at(drill.uri)

    def config(rows: int) -> str:
        return yaml.safe_dump({"prepare": {"data": data, "n_per_class": 8}, "generate": {"rows": rows}})

    def driver(n: int, number: int, rows: int, far: bool) -> Writer:
        return Writer(drill, f"{n}-{number}", kind="drive", number=number, far=far, config=config(rows))

    for n in range(rounds):
        apart = rng.random() < 0.5  # the two have different configs
        writers = []
        for i in range(2):
            writers.append(driver(n, i, 100 + 2 * n + (i if apart else 0), rng.random() < 0.5))
            time.sleep(rng.uniform(0, 0.5))
        time.sleep(rng.uniform(0, 1.5))
        strike(rng, writers, counts, (run, "run.lease.json"))
        until(lambda: not any(w.alive for w in writers))  # noqa: B023
        last = driver(n, 2, 100 + 2 * n, False)
        until(lambda: not last.alive)  # noqa: B023
        for writer in writers:
            assert not writer.count("failed"), writer.told()
        assert last.told()[-1] == ("done", None), last.told()
        counts["finished"] += sum(w.count("done") for w in writers)
        count_told(writers, counts)
        check_driven(run, parse(config(100 + 2 * n), "drill"))
        counts["rounds"] += 1
    counts.update(check_seals(drill))
    return counts


def check_driven(run: Folder, config: Any) -> None:
    """What the last driver was told is there is there, and is of its config alone."""
    assert parse(run.read_bytes("config.yaml").decode(), "there") == config
    for name, section in (("generated", config.generate), ("store", config.annotate), ("rejected", config.annotate)):
        artifacts.check(run / name, deep=True)
        wanted = {f"part-{p}": part_of(name, section.model_dump(mode="json"), p) for p in range(PARTS)}
        assert {file: (run / name).read_bytes(file) for file in (run / name).files() if file != "manifest.json"} == wanted


def check_seals(drill: Drill) -> Counter[str]:
    """Each seal was written by who held the lease then; none by two of the same config one after the other."""
    counts, holder, last = Counter[str](), "", dict[str, str]()
    for path, body in drill.written():
        said = json.loads(body) if path.endswith(".json") else {}
        if path.endswith("run.lease.json"):
            counts["taken over"] += holder not in ("", said["command"]) and not said.get("free")
            holder = "" if said.get("free") else said["command"]
        elif path.endswith("manifest.json") and said["stage"] != "prepare":
            counts["seals"] += 1
            assert holder == f"writer {said['summary']['writer']}", f"{path}: sealed by {said['summary']}, held by {holder}"
            assert last.get(path) != said["fingerprint"], f"{path} was sealed twice"
            last[path] = said["fingerprint"]
    return counts


# -- quick and full ----------------------------------------------------------------------------------------------------


def test_two_editors_lose_nothing(drill: Drill) -> None:
    counts = edit_again_and_again(drill, 1)
    assert counts["edits"] and counts["told who holds it"] == counts["refused"] + counts["lost"]


@pytest.mark.slow  # a minute
def test_two_drivers_lose_nothing(drill: Drill) -> None:
    assert drive_again_and_again(drill, 1)["seals"] >= 3


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_50_rounds_of_two_editors_lose_nothing(drill: Drill) -> None:
    counts = edit_again_and_again(drill, 50)
    print(f"\n50 rounds of two editors: {dict(counts)}")
    assert min(counts[k] for k in ("killed", "paused", "refused")) > 5


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_50_rounds_of_two_drivers_lose_nothing(drill: Drill) -> None:
    counts = drive_again_and_again(drill, 50)
    print(f"\n50 rounds of two drivers: {dict(counts)}")
    assert min(counts[k] for k in ("killed", "paused", "refused", "taken over")) > 5 and counts["lost"] > 0
