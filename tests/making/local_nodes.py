"""A cluster of several nodes on this machine, with an object store in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from making.ports import free_ports

SETTINGS = {"RAY_AUTH_MODE": "disabled", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
WORKER = re.compile("ray::(MapWorker|RayTrainWorker|task|weights_of|teacher_latency)")  # what a stage's workers are called


@contextmanager
def s3_server(journal: Path | None = None) -> Iterator[dict[str, str]]:
    """moto in a process of its own, with a bucket `runs`. Yields the environment that leads to it. journal: as `s3_process.py` writes it."""
    (port,) = free_ports(1)
    env = {**SETTINGS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    command = [sys.executable, str(Path(__file__).with_name("s3_process.py")), str(port), *([str(journal)] if journal else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        import boto3
        from botocore.exceptions import EndpointConnectionError

        client = boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test")
        for _ in range(60):
            try:
                client.create_bucket(Bucket="runs")
                break
            except EndpointConnectionError:
                assert process.poll() is None, "moto did not start"
                time.sleep(0.5)
        yield env
    finally:
        process.kill()
        process.wait()


@dataclass
class LocalNodes:
    """A head without CPUs, and workers of two CPUs."""

    cluster: Any
    env: dict[str, str]  # of a driver on the head
    dashboard: str
    journal: Path  # of the object store

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=2)

    def written(self, uri: str, kind: str) -> int:
        """Files below a URI, with this in their names, that were written so far; those that are gone again count, too."""
        return sum(kind in write["path"] for write in self.writes(uri))

    def saved(self, uri: str) -> list[int]:
        """The steps after which trainings below a URI wrote checkpoints."""
        return [json.loads(write["body"])["step"] for write in self.writes(uri) if write["path"].endswith("state.json") and "body" in write]

    def writes(self, uri: str) -> list[dict[str, str]]:
        """Of the journal, what was written below a URI."""
        below = f'"path": "/{uri.removeprefix("s3://")}/'
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [json.loads(line) for line in lines if below in line]

    def at_work(self) -> list[Any]:
        """The nodes on which a worker of a stage is at work."""
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: str(node.node_id))
        return [node for node in nodes if any(WORKER.match(title) for title in titles(raylet(node)))]

    def kill(self, node: Any) -> None:
        """SIGKILL to the node's raylet, and to all that was its own, as when a machine loses its power."""
        for process in (raylet(node), *raylet(node).children()):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue  # a worker that ended by itself
        self.cluster.remove_node(node, allow_graceful=False)


def raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def titles(process: psutil.Process) -> list[str]:
    """What its children are called."""
    found = []
    for child in process.children():
        try:
            found.append(" ".join(child.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def local_nodes(workers: int, more: dict[str, str] | None = None) -> Iterator[LocalNodes]:
    """Nodes in processes of their own, and an object store beside them. more: of the nodes' environment."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as home, s3_server(Path(home) / "journal") as settings:
        settings |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"} | (more or {})
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)  # which the nodes inherit
        dashboard, agent = free_ports(2)
        system = {f"health_check_{name}_ms": 1000 for name in ("initial_delay", "period", "timeout")} | {
            "health_check_failure_threshold": 4
        }
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": agent}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": system})
        try:
            found = LocalNodes(
                cluster, os.environ | {"RAY_ADDRESS": cluster.address}, f"http://127.0.0.1:{dashboard}", Path(home) / "journal"
            )
            for _ in range(workers):
                found.add()
            yield found
        finally:
            cluster.shutdown()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
