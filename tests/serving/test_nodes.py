"""A Serve app on two nodes, of which one loses its power under load (`make drill-nodes`)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from making.local_nodes import LocalNodes, local_nodes
from making.serving_local import close_to
from making.tiny_run import make_run

from retrikt_ray.predictor import Predictor
from retrikt_ray.serving.server import free_port

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "serve" / "cluster.yaml"
TEXTS = ["a fine film", "so weak", "never cold", "the cast was sharp"]
RECOVERED_S = 15
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalNodes]:
    import ray
    from ray import serve

    with local_nodes(workers=2) as found:
        ray.init(address=found.cluster.address, log_to_driver=False)
        yield found
        serve.shutdown()
        ray.shutdown()


def deployed(run: str, port: int) -> str:
    """The app of serve/cluster.yaml, of two replicas on two nodes, behind the head's proxy."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(CONFIG.read_text())
    (app,) = config["applications"]
    app["args"] |= {"run": run, "open": "read"}
    (endpoint,) = app["deployments"]
    endpoint["max_replicas_per_node"] = 1
    endpoint["ray_actor_options"] = {"num_cpus": 1}
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": config["applications"]}), _blocking=True)
    return f"http://127.0.0.1:{port}"


def homes() -> set[str]:
    """Nodes that have a replica that runs."""
    from ray import serve

    replicas = serve.status().applications["retrikt"].deployments["Endpoint"].replica_states
    from ray.util.state import list_actors

    running = [a for a in list_actors(filters=[("class_name", "=", "ServeReplica:retrikt:Endpoint")], detail=True) if a.state == "ALIVE"]
    return {a.node_id for a in running} if replicas.get("RUNNING") else set()


def until(check: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture(scope="module")
def app(nodes: LocalNodes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """Its address, and the answers to TEXTS."""
    run = str(make_run(tmp_path_factory.mktemp("runs") / "run"))
    url = deployed(run, free_port())
    want = [httpx.post(f"{url}/predict", json={"inputs": text}, timeout=30).json() for text in TEXTS]
    assert [row[0]["label"] for row in want] == Predictor.open(run).predict(TEXTS).labels
    return url, want


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_is_lost_under_load(nodes: LocalNodes, app: tuple[str, list[Any]], seed: int) -> None:
    url, want = app
    until(lambda: len(homes()) == 2, 90)
    seen: list[tuple[float, float, int, bool]] = []  # when asked and answered, status, whether it is right or says when to come back
    ended = threading.Event()

    def ask(which: int) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not ended.is_set():
                which = (which + 1) % len(TEXTS)
                began = time.monotonic()
                answer = client.post("/predict", json={"inputs": TEXTS[which]})
                right = answer.json() == close_to(want[which]) if answer.status_code == 200 else "retry-after" in answer.headers
                seen.append((began, time.monotonic(), answer.status_code, right))
                if answer.status_code != 200:
                    time.sleep(0.1)

    load = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in load:
        thread.start()
    try:
        time.sleep(3 + seed / 3)
        victim = sorted(nodes.cluster.worker_nodes, key=lambda node: node.node_id)[seed % 2]
        killed = time.monotonic()
        nodes.kill(victim)
        time.sleep(RECOVERED_S + 10)
    finally:
        ended.set()
        for thread in load:
            thread.join()
        nodes.add()
    failed = [(answered, status) for _, answered, status, _ in seen if status != 200]
    slowest = max(answered - began for began, answered, _, _ in seen)
    after = max([0.0, *(answered - killed for answered, _ in failed), *(a - killed for b, a, _, _ in seen if a - b > 1)])
    print(
        f"seed {seed}: {len(seen)} requests, failed {dict(Counter(status for _, status in failed))}, the slowest {slowest:.1f} s, "
        f"as before after {after:.1f} s",
        flush=True,
    )
    assert all(right for *_, right in seen)
    assert {status for _, status in failed} <= {503}
    assert after < RECOVERED_S
    assert sum(began - killed > RECOVERED_S and status == 200 for began, _, status, _ in seen) > 20
