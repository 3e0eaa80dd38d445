"""Runs on several local nodes and on an object store: as a submitted job, and with nodes that are killed (`make drill-nodes`)."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from making.local_nodes import LocalNodes, local_nodes
from making.tasks import tiny, write_task

from retrikt_ray.pipeline import BY_NAME, STAGES, load_run
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder

REPO = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
SHARDS = 80
PROGRESS = {  # what a stage writes as it goes, and about how many; prepare works on the driver alone
    "teach": ("state.json", 16),  # checkpoints
    "reinforce": ("state.json", 8),
    "generate": (".scratch/generate-", SHARDS),
    "harvest": ("sifted-", 6),
    "annotate": (".scratch/annotate-", 8),
    "distill": ("state.json", 8),
    "index": ("index/", 10),
    "evaluate": ("report/draft.json", 1),
}
PAUSE_S = {"evaluate": 15.0}  # at most, after which the node is killed; else half a second


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalNodes]:
    with local_nodes(workers=2) as found:
        yield found


def write_corpus(folder: Path) -> Path:
    """22 MB: six pieces."""
    folder.mkdir()
    lines = (f"Minister {i} spoke of rain and snow. We saw {i % 997} cakes and {i} soups. So it was in {i}.\n" for i in range(220_000))
    (folder / "large.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def config(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worker fills a node. Trainings take some seconds, and there is work for both nodes when one is killed."""
    home = tmp_path_factory.mktemp("nodes")
    both = {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 2}
    settings = tiny(
        tiny_lm,
        prepare={"data": str(write_task(home / "data")), "n_per_class": 8, "corpus": str(write_corpus(home / "corpus"))},
        teach={"prompt_epochs": 80, "annotator_epochs": 80},
        reinforce={"steps": 16, "watch_every": 4},
        generate={"rows": 4 * SHARDS, "rows_per_shard": 4, **both},
        harvest={"rows": 100, "candidates": 1500, **both},
        annotate=both,
        index={"factory": "IVF4,Flat", "shards": 6, **both},
        evaluate={"baselines": False, "store_fractions": [0.25, 0.5], **both},
    )
    (home / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return home / "tiny.yaml"


@pytest.fixture(scope="module")
def whole(nodes: LocalNodes, config: Path) -> str:
    """An undisturbed run, which a job made. Its URI.

    The job sends no working directory: nodes of one machine unpack it into the same folder, and the last to do so takes it from under the driver.
    """
    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", nodes.dashboard, "--", sys.executable]
    submit += [str(REPO / "jobs" / "run.py"), str(config), "--out", "s3://runs/whole"]
    env = {k: v for k, v in nodes.env.items() if k != "RAY_ADDRESS"}  # which would come before --address
    done = subprocess.run(submit, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return "s3://runs/whole"


@pytest.mark.slow
def test_a_job_on_three_nodes_leaves_its_run_on_the_object_store(whole: str) -> None:
    run = load_run(whole)
    for stage in run.stages:
        for name in stage.outputs:
            artifacts.check(run.artifact(name), deep=True)
    assert run.report["systems"]["retrikt"]["score"]["mean"] >= 0
    assert not (run.folder / ".scratch").files()


def run_stage(nodes: LocalNodes, stage: str, uri: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        command = [sys.executable, "-m", "retrikt_ray", stage, uri]
        return subprocess.Popen(command, cwd=REPO, env=nodes.env, stdout=output, stderr=subprocess.STDOUT)


def copied(whole: str, uri: str, names: tuple[str, ...]) -> None:
    source, target = Folder.at(whole), Folder.at(uri)
    for name in ("config.yaml", *(f"{artifact}/{file}" for artifact in names for file in (source / artifact).files())):
        target.write_bytes(name, source.read_bytes(name))


def measured(report: Any) -> Any:
    """A report but for times, which no two runs share."""
    if isinstance(report, dict):
        return {key: measured(value) for key, value in report.items() if key not in ("latency_ms", "seconds")}
    return [measured(value) for value in report] if isinstance(report, list) else report


def same_as(whole: str, uri: str, stage: str) -> None:
    """Byte for byte, and of a report what is not a time."""
    for name in BY_NAME[stage].outputs:
        made, wanted = load_run(uri).artifact(name), load_run(whole).artifact(name)
        content = artifacts.check(made, deep=True).content
        if stage == "evaluate":
            assert measured(made.read_json("report.json")) == measured(wanted.read_json("report.json"))
            assert made.read_bytes("predictions.parquet") == wanted.read_bytes("predictions.parquet")
        else:
            assert content == artifacts.check(wanted).content, f"{uri}/{name}"


def test_each_stage_that_has_workers_is_there() -> None:
    assert {"prepare", *PROGRESS} == {stage.name for stage in STAGES}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", PROGRESS)
def test_a_stage_goes_on_without_a_node_that_is_killed(nodes: LocalNodes, whole: str, stage: str, seed: int, tmp_path: Path) -> None:
    """One on which it is at work, at a random moment: when it has written a random part of its files, or a while later."""
    rng = random.Random(f"{stage}:{seed}")
    kind, most = PROGRESS[stage]
    uri, wanted, pause = f"s3://runs/{stage}-{seed}", rng.randrange(-(-most * 3 // 4)), rng.random() * PAUSE_S.get(stage, 0.5)
    copied(whole, uri, load_run(whole).inputs(BY_NAME[stage]))
    log, began = tmp_path / "log", time.monotonic()
    process = run_stage(nodes, stage, uri, log)
    try:
        while (written := nodes.written(uri, kind)) <= wanted:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        time.sleep(pause)
        while not (at_work := nodes.at_work()):
            assert process.poll() is None, "ended before a node was killed"
            time.sleep(0.02)
        nodes.kill(rng.choice(at_work))
        killed = time.monotonic()
        assert process.poll() is None, "ended before the node was killed"
        assert process.wait(400) == 0, log.read_text()
    finally:
        process.kill()
        while len(nodes.cluster.worker_nodes) < 2:
            nodes.add()
    print(
        f"{stage}, seed {seed}: one of {len(at_work)} nodes at work killed after {written} files and {killed - began:.1f} s, "
        f"done {time.monotonic() - killed:.1f} s later",
        flush=True,
    )
    same_as(whole, uri, stage)


@pytest.mark.slow
def test_a_training_saves_when_its_node_is_announced_to_go(nodes: LocalNodes) -> None:
    """A spot node's notice: a checkpoint is written between two eighths of the way, and what comes after it is as if nothing had been."""

    def begun(name: str) -> tuple[subprocess.Popen[bytes], str]:
        uri = f"s3://runs/{name}"
        command = [sys.executable, str(REPO / "tests" / "making" / "train_run.py"), f"{uri}/scratch", f"{uri}/out", "8000"]
        return subprocess.Popen(command, cwd=REPO, env=nodes.env), uri

    calm, undisturbed = begun("calm")
    assert calm.wait(300) == 0
    process, uri = begun("announced")
    try:
        while not (regular := nodes.saved(uri)):
            assert process.poll() is None
            time.sleep(0.05)
        (node,) = nodes.at_work()
        told, left = time.monotonic(), 30
        drain = [str(Path(sys.executable).parent / "ray"), "drain-node", "--node-id", str(node.node_id), "--reason-message", "drill"]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(left)]
        subprocess.run(drain, env=nodes.env, check=True, capture_output=True)
        while not any(step % regular[0] for step in nodes.saved(uri)):
            assert process.poll() is None and time.monotonic() < told + left
            time.sleep(0.05)
        waited, steps = time.monotonic() - told, nodes.saved(uri)
        nodes.kill(node)
        assert process.wait(300) == 0
    finally:
        process.kill()
        while len(nodes.cluster.worker_nodes) < 2:
            nodes.add()
    after = nodes.saved(uri)[len(steps) :]
    print(f"saved {waited:.1f} s after the notice, at step {steps[-1]}; from there to the end by steps {after}", flush=True)
    assert all(step > steps[-1] for step in after)  # nothing was done twice
    assert Folder.at(f"{uri}/out").read_json("learnt.json") == Folder.at(f"{undisturbed}/out").read_json("learnt.json")
