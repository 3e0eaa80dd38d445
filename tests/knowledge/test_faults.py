"""Real faults: processes killed while they edit, and folders damaged on the disk.

The quick counts run with the suite; the full ones, 200 kills and 500 damages, with `make bench-faults`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making.tiny_run import LABELS, make_run

from retrikt_ray.knowledge.compact import compact
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.folders import ArtifactError, Folder

HERE = Path(__file__).parents[1]
ENV = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
Rows = dict[str, tuple[str, str]]  # id -> text, label


def live(knowledge: Knowledge) -> Rows:
    """All rows that can be found."""
    rows = [knowledge.view.row(int(p)) for p in np.flatnonzero(knowledge.view.alive)]
    return {r["id"]: (r["text"], LABELS[int(np.argmax(r["teacher_probs"]))]) for r in rows}


def after(rows: Rows, edit: dict[str, Any]) -> Rows:
    """What an edit makes of the rows."""
    out = dict(rows)
    for row in edit.get("rows", []):
        out[row["id"]] = (row.get("text", rows.get(row["id"], ("", ""))[0]), row["label"])
    for code in edit.get("ids", []):
        del out[code]
    return out


def check_answers(predictor: Predictor, rows: Rows) -> None:
    """Each row is found by its own text, with its label; nothing else is found."""
    knowledge = predictor.knowledge
    found = knowledge.view.search(predictor.student.encode([(t, None) for t, _ in rows.values()])[1].numpy(), len(rows) + 5)
    for i, code in enumerate(rows):
        assert code in found.ids[i] and set(found.ids[i]) == set(rows)
        at = found.ids[i].index(code)
        assert LABELS[int(found.labels[i, at].argmax())] == rows[code][1]
        assert found.scores[i, at] == pytest.approx(1, abs=1e-5)


def kill_again_and_again(root: Path, rounds: int) -> dict[str, int]:
    """Kill an editing process at a random moment, `rounds` times, over one run, and compare what is there with what was acknowledged."""
    run, rng = make_run(root / "run"), random.Random(0)
    rows = live(Knowledge.open(run))
    counts = {"acknowledged": 0, "in flight, not there": 0, "in flight, there": 0, "between edits": 0}
    forker = subprocess.Popen(
        [sys.executable, str(HERE / "making" / "kill_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV
    )
    assert forker.stdin is not None and forker.stdout is not None
    try:
        for n in range(rounds):
            log = root / f"log-{n}"
            print(run, n, log, file=forker.stdin, flush=True)
            victim = int(forker.stdout.readline())
            while not log.exists():  # it is opening the run
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.25))
            os.kill(victim, signal.SIGKILL)
            lines = log.read_text().splitlines()
            time.sleep(0.01)
            lines = log.read_text().splitlines()
            assert lines[0] == "open"
            pending = None
            for line in lines[1:]:
                if line == "done":
                    assert pending is not None
                    rows, pending = after(rows, pending), None
                    counts["acknowledged"] += 1
                else:
                    pending = json.loads(line)
            predictor = Predictor.open(run)  # consistent: every checksum and every position is checked here
            there = live(predictor.knowledge)
            if pending is None:
                assert there == rows
                counts["between edits"] += 1
            else:
                assert there in (rows, after(rows, pending)), f"round {n}: neither before nor after {pending}"
                counts["in flight, there" if there != rows else "in flight, not there"] += 1
                rows = there
            check_answers(predictor, rows)
    finally:
        forker.stdin.close()
        forker.wait(timeout=30)
    return counts


def test_kills_lose_nothing(tmp_path: Path) -> None:
    counts = kill_again_and_again(tmp_path, 15)
    assert counts["acknowledged"] > 15


@pytest.mark.bench
def test_200_kills_lose_nothing(tmp_path: Path) -> None:
    counts = kill_again_and_again(tmp_path, 200)
    print(f"\n200 SIGKILLs: {counts}")
    assert counts["in flight, not there"] > 20 and counts["acknowledged"] > 200


# -- damage ------------------------------------------------------------------------------------------------------------


def make_edited(root: Path, seed: int) -> Folder:
    """A run with a compacted base and edits upon it, so that every kind of file is there."""
    run = make_run(root, seed=seed)
    knowledge = Knowledge.open(run)
    knowledge.add([{"text": f"a very brave film {seed}", "label": "positive"}])
    compact(run)
    knowledge.refresh()
    knowledge.add([{"text": f"but never weak {seed}", "label": "negative"}])
    knowledge.delete(["train-000003"])
    return run


def damage(rng: random.Random, root: Path, folder: str, other: Path) -> tuple[str, list[str]]:
    """Damage one or two files below root/folder; what was done, and the names of which one must be told."""
    files = sorted(p for p in (root / folder).rglob("*") if p.is_file())

    def named(path: Path) -> str:
        return path.relative_to(root).as_posix()

    while True:
        victim = rng.choice(files)
        data = victim.read_bytes()
        kind = rng.choice(["flip", "cut", "remove", "swap", "foreign", "empty", "grow"])
        changed = data
        if kind == "flip":
            bits = bytearray(data)
            for at in {rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 5]))}:
                bits[at] ^= 1 << rng.randrange(8)
            changed = bytes(bits)
        elif kind == "cut":
            changed = data[: rng.randrange(len(data))]
        elif kind == "empty":
            changed = b""
        elif kind == "grow":
            changed = data + rng.randbytes(rng.randint(1, 99))
        elif kind == "foreign":  # the same file of another run, whole and sealed
            twin = other / victim.relative_to(root)
            changed = twin.read_bytes() if twin.exists() else data
        elif kind == "swap":
            second = rng.choice(files)
            changed = second.read_bytes()
            if changed != data:
                second.write_bytes(data)
                victim.write_bytes(changed)
                return kind, [named(victim), named(second)]
        if kind == "remove":
            victim.unlink()
            return kind, [named(victim)]
        if changed != data:
            victim.write_bytes(changed)
            return kind, [named(victim)]


def damage_again_and_again(root: Path, rounds: int) -> dict[str, int]:
    """Damage a copy of a run, `rounds` times: the run is refused by the name of the file, and never answers."""
    rng = random.Random(0)
    plain, edited = make_run(root / "plain"), make_edited(root / "edited", 0)
    make_run(root / "other-plain", seed=1)
    make_edited(root / "other-edited", 1)
    counts: dict[str, int] = {}
    for n in range(rounds):
        name = rng.choice(["plain", "edited"])
        copy = root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root / name, copy)
        folder = "index" if name == "plain" else "knowledge"
        kind, names = damage(rng, copy, folder, root / f"other-{name}")
        try:
            Predictor.open(str(copy)).predict([("a fine film", None)])
        except ArtifactError as error:
            told = str(error).replace(" is not complete: it has no ", "/")
            assert any(n in told for n in names), f"round {n}: {kind} of {names}, told: {error}"
            counts[kind] = counts.get(kind, 0) + 1
        else:
            raise AssertionError(f"round {n}: {kind} of {names} was not seen")
    for run in (plain, edited):
        Predictor.open(run)
    return counts


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    assert sum(damage_again_and_again(tmp_path, 60).values()) == 60


@pytest.mark.bench
def test_500_damages_are_refused_by_name(tmp_path: Path) -> None:
    counts = damage_again_and_again(tmp_path, 500)
    print(f"\n500 damaged index folders, all refused by name: {counts}")
    assert sum(counts.values()) == 500 and len(counts) == 7
