"""A whole run on a cluster that autoscales: from a head without CPUs to a finished run, and back. `make drill-autoscale` prints the timeline."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from making.autoscaling import Autoscaling, autoscaling
from making.tasks import tiny, write_task

from retrikt_ray.pipeline import load_run
from retrikt_ray.runtime import artifacts


def watch(cluster: Autoscaling, stop: threading.Event) -> None:
    """Note each change in the number of worker nodes."""
    before = 0
    while not stop.wait(0.5):
        now = cluster.workers()
        if now != before:
            cluster.note(f"{now} worker node{'' if now == 1 else 's'} ({now - before:+d})")
        before = now


@pytest.mark.slow
def test_a_run_starts_with_no_workers_scales_up_finishes_and_scales_down(tiny_lm: str, tmp_path: Path) -> None:
    settings = tiny(
        tiny_lm,
        prepare={"data": str(write_task(tmp_path / "data")), "n_per_class": 8},
        reinforce={"steps": 0},
        generate={"rows": 48, "rows_per_shard": 8},
        evaluate={"baselines": False, "store_fractions": []},
        cluster={"nodes": [{"cpu": 1, "max": 4}], "wait_s": 120},
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    with autoscaling({"worker": ({"CPU": 1}, 4)}) as cluster:
        stop = threading.Event()
        watcher = threading.Thread(target=watch, args=(cluster, stop))
        watcher.start()
        try:
            cluster.note("the head is up, without CPUs; 0 worker nodes")
            command = [sys.executable, "-m", "retrikt_ray", "run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")]
            with subprocess.Popen(command, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    cluster.note(f"| {line.rstrip()}")
            cluster.note(f"the run ended with exit code {process.returncode}")
            assert process.returncode == 0
            deadline = time.monotonic() + 90
            while cluster.workers() and time.monotonic() < deadline:
                time.sleep(0.5)
            time.sleep(1)
        finally:
            stop.set()
            watcher.join()
        assert cluster.workers() == 0
    said = [what for _, what in cluster.timeline]
    assert any("0 of 1 places for workers (CPU 1) stand" in line and "waiting for nodes" in line for line in said)
    assert any(line.startswith("2 worker nodes") for line in said)  # two generators: two of the four CPUs are kept to spare
    assert [line for line in said if "worker node" in line][-1].startswith("0 worker nodes (-")
    for name in ("generated", "store", "student", "index", "report"):
        artifacts.check(load_run(str(tmp_path / "run")).artifact(name), deep=True)
