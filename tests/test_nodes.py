"""Runs on several local nodes and on an object store: as a submitted job, and with nodes that are killed (`make drill-nodes`)."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml
from making.local_nodes import LocalNodes, local_nodes
from making.tasks import tiny, write_task

from retrikt_ray.pipeline import BY_NAME, load_run
from retrikt_ray.runtime import artifacts
from retrikt_ray.runtime.folders import Folder

REPO = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
INPUTS = {"generate": ("task", "teacher", "policy"), "annotate": ("task", "teacher", "generated")}
PARTS = {"generate": "generated/part-", "annotate": ".scratch/annotate-"}  # where a stage's work shows
SHARDS = 80


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalNodes]:
    with local_nodes(workers=2) as found:
        yield found


@pytest.fixture(scope="module")
def config(tiny_lm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worker of generate and annotate fills a node; there are enough shards for both to have some when one is killed."""
    home = tmp_path_factory.mktemp("nodes")
    both = {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 2}
    settings = tiny(
        tiny_lm,
        prepare={"data": str(write_task(home / "data")), "n_per_class": 8},
        reinforce={"steps": 0},
        generate={"rows": 4 * SHARDS, "rows_per_shard": 4, **both},
        annotate=both,
        evaluate={"baselines": False, "store_fractions": []},
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


def same_as(whole: str, uri: str, stage: str) -> None:
    for name in BY_NAME[stage].outputs:
        made, wanted = artifacts.check(load_run(uri).artifact(name), deep=True), artifacts.check(load_run(whole).artifact(name))
        assert made.content == wanted.content, f"{uri}/{name}"


def parts(env: dict[str, str], uri: str, stage: str) -> int:
    """Parts that the stage has written so far."""
    pages = boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"]).get_paginator("list_objects_v2")
    prefix = f"{uri.removeprefix('s3://runs/')}/{PARTS[stage]}"
    return sum(page["KeyCount"] for page in pages.paginate(Bucket="runs", Prefix=prefix))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", INPUTS)
def test_a_stage_goes_on_without_a_node_that_is_killed(nodes: LocalNodes, whole: str, stage: str, seed: int, tmp_path: Path) -> None:
    """A random node at a random moment: when a random number of the parts are there."""
    rng = random.Random(f"{stage}:{seed}")
    uri, wanted = f"s3://runs/{stage}-{seed}", rng.randrange(SHARDS - 10)
    copied(whole, uri, INPUTS[stage])
    log, began = tmp_path / "log", time.monotonic()
    process = run_stage(nodes, stage, uri, log)
    try:
        while (written := parts(nodes.env, uri, stage)) < wanted:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        nodes.kill(rng.choice(sorted(nodes.cluster.worker_nodes, key=lambda node: node.unique_id)))
        killed = time.monotonic()
        assert process.poll() is None, "ended before the node was killed"
        assert process.wait(400) == 0, log.read_text()
    finally:
        process.kill()
        while len(nodes.cluster.worker_nodes) < 2:
            nodes.add()
    print(
        f"{stage}, seed {seed}: a node of two killed after {written} parts and {killed - began:.1f} s, "
        f"done {time.monotonic() - killed:.1f} s later",
        flush=True,
    )
    same_as(whole, uri, stage)
