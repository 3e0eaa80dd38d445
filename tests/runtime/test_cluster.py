"""Sizing workers, tasks and actor pools."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from retrikt_ray.config import parse
from retrikt_ray.runtime import cluster, nodes
from retrikt_ray.runtime.cluster import Workers, each, plan, pool
from retrikt_ray.runtime.nodes import ClusterConfig, Node, NodeConfig, Nodes, launched
from retrikt_ray.runtime.settings import ConfigError, Range, Scaled


def cluster_of(*standing: tuple[float, float], grows: tuple[tuple[float, float, int], ...] = ()) -> Nodes:
    """Nodes that stand, as (CPUs, GPUs), and kinds that can be started, as (CPUs, GPUs, at most)."""
    kinds = tuple(NodeConfig(cpu=cpus, gpu=gpus, max=most) for cpus, gpus, most in grows)
    return Nodes.of([Node(*n) for n in standing], ClusterConfig(nodes=kinds))


HERE = {"CPU": cluster_of((4, 0)), "small": cluster_of((1, 0)), "GPU": cluster_of((32, 4)), "two": cluster_of((4, 1), (4, 1))}
CLOUD = cluster_of((0, 0), grows=((8, 1, 64), (16, 0, 4)))  # a head without CPUs, and nothing else yet
PARTLY = cluster_of((0, 0), (8, 1), (8, 1), grows=((8, 1, 64), (16, 0, 4)))


@pytest.mark.parametrize(
    ("have", "keys", "asked", "want"),
    [
        (HERE["CPU"], {}, {}, Workers(2, 1, 0)),  # two CPUs to spare for Ray Data's own tasks
        (HERE["CPU"], {}, {"cpus": 2, "grow": False}, Workers(1, 2, 0)),  # a training stage
        (HERE["small"], {}, {"cpus": 2}, Workers(1, 1, 0)),
        (HERE["GPU"], {}, {}, Workers(4, 1, 1)),
        (HERE["GPU"], {}, {"cpus": 2, "grow": False}, Workers(4, 2, 1)),
        (HERE["GPU"], {"gpus_per_worker": 0.5}, {}, Workers(8, 1, 0.5)),
        (HERE["GPU"], {"gpus_per_worker": 0.1}, {}, Workers(32, 1, 0.1)),  # 40 by GPUs, 32 by CPUs
        (HERE["GPU"], {"gpus_per_worker": 0, "cpus_per_worker": 5}, {}, Workers(6, 5, 0)),
        (HERE["CPU"], {"workers": 3}, {}, Workers(3, 1, 0)),
        (HERE["CPU"], {"workers": {"min": 2, "max": 3}}, {}, Workers(3, 1, 0, 2)),
        (HERE["CPU"], {"workers": {"min": 2, "max": 9}}, {}, Workers(4, 1, 0, 2)),  # the most that fit
        (HERE["two"], {}, {"cpus": 6}, Workers(2, 4, 1)),  # no node has six CPUs
        (CLOUD, {}, {}, Workers(64, 1, 1, 1)),
        (CLOUD, {}, {"cpus": 2, "grow": False}, Workers(1, 2, 1)),  # a training asks for one node, unless it is told to
        (CLOUD, {"workers": {"min": 2, "max": 8}}, {"cpus": 2, "grow": False}, Workers(8, 2, 1, 2)),
        (CLOUD, {"workers": 5}, {}, Workers(5, 1, 1)),
        (CLOUD, {"gpus_per_worker": 0, "cpus_per_worker": 16}, {}, Workers(4, 16, 0, 1)),  # only four nodes are so wide
        (CLOUD, {"gpus_per_worker": 0, "cpus_per_worker": 8}, {}, Workers(64 + 2 * 4 - 1, 8, 0, 1)),  # two CPUs to spare
        (PARTLY, {}, {}, Workers(64, 1, 1, 1)),  # not for the nodes of today alone
        (PARTLY, {}, {"cpus": 2, "grow": False}, Workers(2, 2, 1)),
    ],
)
def test_plan(have: Nodes, keys: dict[str, Any], asked: dict[str, Any], want: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: have)
    assert plan(Scaled(**keys), "generate", **asked) == want


@pytest.mark.parametrize(
    ("have", "keys", "said"),
    [
        (HERE["CPU"], {"workers": 3, "cpus_per_worker": 2}, "generate.workers=3 with generate.cpus_per_worker=2 asks for 6 CPUs; .* can grow to, 4$"),
        (HERE["CPU"], {"workers": 1, "gpus_per_worker": 1}, "generate.workers=1 with generate.gpus_per_worker=1 asks for 1 GPUs; .* can grow to, 0$"),
        (HERE["two"], {"gpus_per_worker": 2}, r"=1 with generate.gpus_per_worker=2 .* to, 2, but a worker \(CPU 1, GPU 2\) lies on one node, and only 0 fit on 2 x \(CPU 4, GPU 1\)$"),
        (CLOUD, {"workers": 1, "gpus_per_worker": 8}, r"asks for 8 GPUs; .* 64, but a worker .* only 0 fit on 4 x \(CPU 16, GPU 0\), 64 x \(CPU 8, GPU 1\), 1 x \(CPU 0"),
        (CLOUD, {"workers": {"min": 65, "max": 99}}, "workers=65 .* asks for 65 GPUs; .* can grow to, 64$"),
        (CLOUD, {"workers": 2, "cpus_per_worker": 12}, r"asks for 24 CPUs; .* 576, but a worker \(CPU 12, GPU 1\) lies on one node, and only 0 fit"),
    ],
)  # fmt: skip
def test_plan_refuses_what_the_cluster_can_never_give(
    have: Nodes, keys: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: have)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=said):
        plan(Scaled(**keys), "generate")


def test_a_cluster_that_may_autoscale_is_asked_for_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: cluster_of((0, 0)))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"If it autoscales, say to what: `cluster.nodes=\["):
        plan(Scaled(), "generate")


@pytest.mark.parametrize(
    "workers", [-1, True, "3", 2.0, {"min": 3, "max": 2}, {"min": 0, "max": 2}, {"min": 1}, {"min": 1, "mx": 2}, [1, 2]]
)
def test_what_is_no_number_of_workers_is_refused(workers: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"generate.workers: found .*expected a number, 0 or more, or \{min: N, max: M\} with 1 <= N <= M"
    ):
        parse(yaml.safe_dump({"generate": {"workers": workers}}), "x")


def test_workers_and_nodes_come_back_from_a_run_as_they_were() -> None:
    text = "{generate: {workers: {min: 1, max: 4}}, cluster: {nodes: [{cpu: 8, gpu: 1, max: 64}], wait_s: 60}}"
    config = parse(text, "x", ["annotate.workers={min: 2, max: 3}"])
    again = parse(yaml.safe_dump(config.model_dump(mode="json")), "y")
    assert again == config and again.annotate.workers == Range(min=2, max=3)
    with pytest.raises(ConfigError, match=r"cluster.nodes.0.gpus: there is no such key"):
        parse("cluster: {nodes: [{cpu: 8, gpus: 1, max: 64}]}", "x")


def test_kinds_of_nodes_are_read_from_the_launchers_file(tmp_path: Path) -> None:
    file = tmp_path / "ray_bootstrap_config.yaml"
    assert launched(file) == ()
    kinds = {
        "head": {"resources": {"CPU": 0}},
        "gpu": {"resources": {"CPU": 8, "GPU": 1, "memory": 3e10}, "max_workers": 99},
        "cpu": {"resources": {"CPU": 16}, "max_workers": 4},
        "off": {"resources": {"CPU": 1}, "max_workers": 0},
    }
    file.write_text(yaml.safe_dump({"head_node_type": "head", "max_workers": 64, "available_node_types": kinds}, sort_keys=False))
    assert launched(file) == (NodeConfig(cpu=8, gpu=1, max=64), NodeConfig(cpu=16, max=4))


def test_waiting_for_nodes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Says what it waits for, asks for all places and lets go of them, and gives up in the end."""
    asked: list[Any] = []
    coming = iter([[Node(0, 0)], [Node(0, 0), Node(8, 1)], [Node(8, 1), Node(8, 1)]])
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(nodes, "standing", lambda: next(coming))
    monkeypatch.setattr(nodes, "starting", lambda: ", 2 on their way")
    monkeypatch.setattr(nodes, "POLL_S", 0.01)
    bundle = {"CPU": 4.0, "GPU": 1.0}
    with nodes.held(ClusterConfig(), "generate", bundle, fewest=2, most=3):
        assert asked == [[bundle] * 3] * 2  # once, and again while it waits
    assert asked[2:] == [[]]
    first, last = capsys.readouterr().out.splitlines()
    assert first == "generate: 0 of 2 places for workers (CPU 4, GPU 1) stand after 0 s; waiting for nodes, 2 on their way"
    assert last == "generate: 2 places stand after 0 s"
    monkeypatch.setattr(nodes, "standing", lambda: [])
    with pytest.raises(ConfigError, match=r"0 of 1 places .* longer than cluster.wait_s=0.05, 2 on their way. The same command goes on"):
        with nodes.held(ClusterConfig(wait_s=0.05), "teach", bundle, fewest=1, most=1):
            pytest.fail("there are no nodes")
    assert asked[-1] == []


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """With what `connect` would start or join Ray, in a process that looks new."""
    import ray
    from ray.data import DataContext

    given: dict[str, Any] = {}
    before, timeout = dict(os.environ), DataContext.get_current().execution_no_progress_timeout_s
    for name in (*cluster.ENVIRONMENT, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(cluster, "quiet", lambda _: None)
    yield given
    os.environ.clear()
    os.environ.update(before)
    cluster.joined, cluster.private = ClusterConfig(), False
    DataContext.get_current().execution_no_progress_timeout_s = timeout


def test_the_environment_goes_to_the_workers_of_all_nodes(begun: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the job has set itself stays: Ray refuses a variable that is set twice."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    cluster.connect(None, ClusterConfig(nodes=(NodeConfig(cpu=8, max=2),), wait_s=900))
    sent = begun["runtime_env"]["env_vars"]
    assert sent["OMP_WAIT_POLICY"] == "PASSIVE" and sent.keys() == cluster.ENVIRONMENT.keys() - {"TOKENIZERS_PARALLELISM"}
    assert {name: os.environ[name] for name in sent} == sent and os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_waiting_for_a_node_is_no_hang(begun: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of this process alone does not grow, whatever the config says of another."""
    from ray.data import DataContext

    grows = ClusterConfig(nodes=(NodeConfig(cpu=8, max=2),), wait_s=900)
    cluster.connect(None, grows)
    assert DataContext.get_current().execution_no_progress_timeout_s == 600 and not cluster.joined.nodes
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster.connect(None, grows)
    assert DataContext.get_current().execution_no_progress_timeout_s == 600 + 900 and cluster.joined == grows


def test_a_local_cluster_has_the_cpus_of_the_container(begun: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """LOKY_MAX_CPU_COUNT stands in for a quota of the kernel; the machine has more."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    cluster.connect()
    assert begun["num_cpus"] == 1 + 2 and begun["address"] == "local"


class Squares:
    """Says of each item its square, three times."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert len(batch["item"]) == 1
        return {"value": np.full(3, int(batch["item"][0]) ** 2 + self.offset)}


def test_pool(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every item once, rows as they come; no more actors than items, for they would hold CPUs for nothing."""
    import ray.data

    sizes, strategy = [], ray.data.ActorPoolStrategy
    monkeypatch.setattr(ray.data, "ActorPoolStrategy", lambda size: (sizes.append(size), strategy(size=size))[1])
    rows = list(pool(Squares, (100,), [{"item": i} for i in (3, 4)], Workers(2, 1, 0)))
    assert sorted(int(r["value"]) for r in rows) == [109] * 3 + [116] * 3
    few = list(pool(Squares, (0,), [{"item": 5}], Workers(64, 1, 0)))
    assert [int(r["value"]) for r in few] == [25] * 3 and sizes == [2, 1]


def test_each_gives_results_in_order_and_ends_with_the_first_failure(cluster: None) -> None:
    assert each(pow, [(2, 3), (3, 2), (4, 2)], Workers(2, 1, 0), "powers") == [8, 9, 16]
    assert each(pow, [(2, 3)], None, "powers") == [8]  # here
    with pytest.raises(ZeroDivisionError):
        each(divmod, [(1, 1), (1, 0)], Workers(1, 1, 0), "divide")


def test_a_task_gets_one_result_of_others_at_a_time(cluster: None) -> None:
    """Whether they are references or there; and those that it does not ask for not at all: here one that failed."""

    def inverse(number: int) -> float:
        return 1 / number

    def first(results: Any) -> tuple[float, int]:
        return next(iter(results)), len(results)

    workers = Workers(2, 1, 0)
    made = each(inverse, [(2,), (0,)], workers, "made", by_reference=True)
    assert each(first, [(made,)], workers, "first") == [(0.5, 2)]
    with pytest.raises(ZeroDivisionError):
        each(list, [(made,)], workers, "all")
    assert each(first, [([0.25, 4],)], workers, "there") == each(first, [([0.25, 4],)], None, "here") == [(0.25, 2)]
