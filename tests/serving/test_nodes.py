"""A Serve app on two nodes, of which one loses its power under load (`make drill-nodes`)."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from making.local_nodes import LocalNodes, local_nodes
from making.ports import free_ports
from making.serving_local import close_to
from making.tiny_run import TEXTS, make_run

from retrikt_ray.predictor import Predictor

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ROUTES = ("predict", "explain", "retrieve", "embed")
CLIENTS, SLOW_S, RECOVERED_S = 8, 1.0, 15
SEEDS = (0, 1, 2)
Question = tuple[str, str]  # route and text


class Seen(NamedTuple):
    """A request: when it was asked and answered, its status, and whether it is the answer that it was before, or says when to come again."""

    asked: float
    answered: float
    status: int
    right: bool


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalNodes]:
    """Started with what the image says of Serve."""
    image = dict(re.findall(r"\b(RAY_SERVE_\w+)=(\S+)", (ROOT / "cluster" / "Dockerfile").read_text()))
    with local_nodes(2, image) as found:
        yield found


class App:
    """The app of serve/cluster.yaml: two replicas on two nodes, behind the head's proxy (the nodes are one machine with one port)."""

    def __init__(self, nodes: LocalNodes, run: str, file: Path) -> None:
        config = yaml.safe_load((ROOT / "serve" / "cluster.yaml").read_text())
        (port,) = free_ports(1)
        config |= {"proxy_location": "HeadOnly", "http_options": config["http_options"] | {"host": "127.0.0.1", "port": port}}
        config["applications"][0]["args"] |= {"run": run, "open": "read"}
        file.write_text(yaml.safe_dump(config))
        self.nodes, self.run, self.url = nodes, run, f"http://127.0.0.1:{port}"
        self.serve("deploy", str(file))

    def serve(self, *arguments: str) -> None:
        command = [str(Path(sys.executable).parent / "serve"), *arguments, "--address", self.nodes.dashboard]
        done = subprocess.run(command, cwd=ROOT, env=self.nodes.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def homes(self) -> list[str]:
        """The nodes of the replicas that run."""
        told = httpx.get(f"{self.nodes.dashboard}/api/serve/applications/", timeout=30).json()["applications"]
        replicas = told["retrikt"]["deployments"]["Endpoint"]["replicas"] if told.get("retrikt", {}).get("deployments") else []
        return [replica["node_id"] for replica in replicas if replica["state"] == "RUNNING"]

    def ask(self, client: httpx.Client, question: Question) -> httpx.Response:
        route, text = question
        return client.post(f"{self.url}/{route}", json={"inputs": text})


def until(check: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


@pytest.fixture
def app(nodes: LocalNodes, tmp_path: Path) -> Iterator[App]:
    while len(nodes.cluster.worker_nodes) < 2:
        nodes.add()
    run = f"s3://runs/{tmp_path.name}"
    make_run(run)
    found = App(nodes, run, tmp_path / "app.yaml")
    until(lambda: len(found.homes()) == 2, 120)
    yield found
    found.serve("shutdown", "-y")


def load(app: App, want: dict[Question, Any], rng: random.Random, seen: list[Seen], ended: threading.Event) -> None:
    """One client: some question after another, until it has ended."""
    questions = list(want)
    with httpx.Client(timeout=60) as client:
        while not ended.is_set():
            question, asked = rng.choice(questions), time.monotonic()
            try:
                answer = app.ask(client, question)
            except httpx.HTTPError:
                seen.append(Seen(asked, time.monotonic(), 0, False))
                continue
            right = answer.json() == close_to(want[question]) if answer.status_code == 200 else "retry-after" in answer.headers
            seen.append(Seen(asked, time.monotonic(), answer.status_code, right))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_is_lost_under_load(nodes: LocalNodes, app: App, seed: int) -> None:
    """At a random moment. Two replicas answer, then one, then two again, both on the node that is left."""
    rng = random.Random(seed)
    assert len(set(app.homes())) == 2
    with httpx.Client(timeout=60) as client:
        want = {(route, text): app.ask(client, (route, text)).json() for route in ROUTES for text in TEXTS}
    assert [want["predict", text][0]["label"] for text in TEXTS] == Predictor.open(app.run).predict(TEXTS).labels
    seen, ended = list[Seen](), threading.Event()
    clients = [threading.Thread(target=load, args=(app, want, random.Random(f"{seed}:{i}"), seen, ended)) for i in range(CLIENTS)]
    for thread in clients:
        thread.start()
    try:
        time.sleep(2 + 2 * rng.random())
        victim = rng.choice(sorted(nodes.cluster.worker_nodes, key=lambda node: str(node.node_id)))
        killed = time.monotonic()
        nodes.kill(victim)
        until(lambda: victim.node_id not in app.homes() and len(app.homes()) == 2, 60)
        whole = time.monotonic() - killed
        time.sleep(RECOVERED_S)
    finally:
        ended.set()
        for thread in clients:
            thread.join()
    failed = [one for one in seen if one.status != 200]
    late = [one for one in seen if one.status == 200 and one.answered - one.asked > SLOW_S and one.answered > killed]
    after = max((one.answered - killed for one in [*failed, *late]), default=0.0)
    print(
        f"seed {seed}: {len(seen)} requests, failed {dict(Counter(one.status for one in failed))}, the slowest took "
        f"{max(one.answered - one.asked for one in seen):.1f} s; as before after {after:.1f} s, two replicas again after {whole:.1f} s",
        flush=True,
    )
    assert {one.status for one in failed} <= {503}
    assert all(one.right for one in seen)
    assert after < RECOVERED_S
    assert sum(one.asked > killed + RECOVERED_S for one in seen) > 20
