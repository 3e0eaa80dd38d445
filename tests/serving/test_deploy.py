"""What `serve deploy` does to a running app when only its `user_config` is another: the same processes answer from another run."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from making.tiny_run import make_run

from retrikt_ray.predictor import Predictor
from retrikt_ray.serving.server import free_port

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "serve" / "retrikt.yaml"


@pytest.fixture
def deploy() -> Iterator[Any]:
    """Deploys a config as `serve deploy` does, by the call that it comes to; its address."""
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def work(config: dict[str, Any]) -> str:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)
        return f"http://127.0.0.1:{port}"

    yield work
    serve.shutdown()
    ray.shutdown()


def config_of(run: str, user_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The YAML of the repo with this run; user_config: as operations.md shows it."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    (app,) = config["applications"]
    app["args"]["run"] = run
    app["deployments"] = [{"name": "Endpoint", "user_config": user_config}] if user_config else []
    return {"applications": config["applications"]}


def replicas() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if " ".join(p.cmdline()).startswith("ray::ServeReplica")}


def test_a_user_config_swaps_the_run_under_load(deploy: Any, tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / name, seed=seed)) for seed, name in enumerate(("first", "second"))]
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / "store" / "part-00001.parquet").write_bytes(b"cut")
    url = deploy(config_of(runs[0]))
    before, ended = replicas(), threading.Event()
    assert len(before) == 1
    answers: list[tuple[int, str, Any]] = []

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not ended.is_set():
                answer = client.post("/predict", json={"inputs": "a fine film"})
                answers.append((answer.status_code, answer.headers.get("x-knowledge-version", ""), answer.json()))

    def until(check: Any) -> Any:
        end = time.monotonic() + 60
        while not check(info := httpx.get(f"{url}/info", timeout=30).json()):
            assert time.monotonic() < end, info
            time.sleep(0.1)
        return info

    opened = [Predictor.open(run) for run in runs]
    load = [threading.Thread(target=ask) for _ in range(4)]
    for thread in load:
        thread.start()
    try:
        for run, predictor in ((runs[1], opened[1]), (runs[0], opened[0]), (runs[1], opened[1])):
            deploy(config_of(runs[0], {"run": run}))
            until(lambda info, release=predictor.release: info["release"] == release and info["refused"] is None)
        deploy(config_of(runs[0], {"run": str(broken)}))
        info = until(lambda info: info["refused"])
        assert info["release"] == opened[1].release and info["refused"].startswith(
            "the run/store/part-00001.parquet has 3 bytes, its manifest says"
        )
        deploy(config_of(runs[0], {"run": runs[1]}))
        until(lambda info: info["refused"] is None)
    finally:
        ended.set()
        for thread in load:
            thread.join()
    assert {status for status, *_ in answers} == {200} and len(answers) > 100
    want = {f"{p.release}.0": p.predict("a fine film").answers[0].max() for p in opened}
    assert {version for _, version, _ in answers} == want.keys()
    assert all(body[0]["score"] == pytest.approx(want[version], abs=1e-6) for _, version, body in answers)
    assert replicas() == before
