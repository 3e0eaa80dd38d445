"""Generation under fire: processes of a running stage killed at random moments. With `make bench-faults`; a single kill runs with the suite (`test_pipeline.py`)."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from retrikt_ray import pipeline
from retrikt_ray.runtime import artifacts

ROWS, PER_SHARD, KILLS = 1600, 20, 30


def prepared(run: pipeline.Run, folder: Path) -> Path:
    """A copy up to the policy, about to generate many small shards."""
    for name in ("task", "teacher", "policy"):
        shutil.copytree(Path(run.folder.uri) / name, folder / name)
    config = yaml.safe_load((Path(run.folder.uri) / "config.yaml").read_text())
    config["generate"] |= {"rows": ROWS, "rows_per_shard": PER_SHARD, "workers": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    """The actors that write shards, of this driver's own Ray."""
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # the driver has ended
        for child in driver.children(recursive=True):
            with suppress(psutil.Error):  # it has gone meanwhile
                if "ShardWriter" in " ".join(child.cmdline()):
                    found.append(child)
    return found


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_thirty_kills_lose_and_double_nothing(run: pipeline.Run, tmp_path: Path) -> None:
    rng = random.Random(0)
    calm, fire = prepared(run, tmp_path / "calm"), prepared(run, tmp_path / "fire")
    subprocess.run([sys.executable, "-m", "retrikt_ray", "generate", str(calm)], check=True, stdout=subprocess.DEVNULL, timeout=600)
    wanted = artifacts.check(pipeline.load_run(str(calm)).artifact("generated"), deep=True)

    kills = {"driver": 0, "worker": 0}

    def complete() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in fire.glob(".scratch/generate-*/shard-*.parquet")}

    while sum(kills.values()) < KILLS:
        before = complete()
        process = subprocess.Popen(
            [sys.executable, "-m", "retrikt_ray", "generate", str(fire)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        driver = psutil.Process(process.pid)
        while process.poll() is None and sum(kills.values()) < KILLS:
            if rng.random() < 0.6:  # an actor, once there are any: from its first moments to its last shard
                while process.poll() is None and not workers_of(driver):
                    time.sleep(0.1)
                time.sleep(rng.uniform(0, 3))
                if victims := workers_of(driver):
                    with suppress(psutil.NoSuchProcess):
                        rng.choice(victims).kill()
                        kills["worker"] += 1
            else:  # the driver: from its imports to its seal
                time.sleep(rng.uniform(0, 15))
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    kills["driver"] += 1
        output = process.communicate(timeout=600)[0].decode()
        assert process.returncode in (0, -9), output  # a killed worker is replaced; the stage itself does not fail
        if process.returncode:
            assert before.items() <= complete().items()  # what was complete is not made again
        else:
            assert artifacts.check(pipeline.load_run(str(fire)).artifact("generated"), deep=True).content == wanted.content
            if sum(kills.values()) < KILLS:
                pipeline.load_run(str(fire)).artifact("generated").remove()
    done = subprocess.run([sys.executable, "-m", "retrikt_ray", "generate", str(fire)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"\n{kills['worker']} workers and {kills['driver']} drivers killed while {ROWS:,} rows were written")
    found = artifacts.check(pipeline.load_run(str(fire)).artifact("generated"), deep=True)
    assert found.content == wanted.content and min(kills.values()) >= 5
