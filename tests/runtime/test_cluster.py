"""Sizing workers, tasks and actor pools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retrikt_ray.runtime import cluster
from retrikt_ray.runtime.cluster import Workers, each, plan, pool
from retrikt_ray.runtime.settings import ConfigError, Scaled


@pytest.mark.parametrize(
    ("have", "keys", "asked", "want"),
    [
        ({"CPU": 4, "GPU": 0}, {}, {}, Workers(2, 1, 0)),  # two CPUs to spare for Ray Data's own tasks
        ({"CPU": 4, "GPU": 0}, {}, {"cpus": 2, "grow": False}, Workers(1, 2, 0)),  # a training stage
        ({"CPU": 1, "GPU": 0}, {}, {"cpus": 2}, Workers(1, 1, 0)),
        ({"CPU": 32, "GPU": 4}, {}, {}, Workers(4, 1, 1)),
        ({"CPU": 32, "GPU": 4}, {}, {"cpus": 2, "grow": False}, Workers(4, 2, 1)),
        ({"CPU": 32, "GPU": 4}, {"gpus_per_worker": 0.5}, {}, Workers(8, 1, 0.5)),
        ({"CPU": 32, "GPU": 4}, {"gpus_per_worker": 0, "cpus_per_worker": 5}, {}, Workers(6, 5, 0)),
        ({"CPU": 4, "GPU": 0}, {"workers": 3}, {}, Workers(3, 1, 0)),
    ],
)
def test_plan(have: dict[str, float], keys: dict[str, Any], asked: dict[str, Any], want: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "capacity", lambda: have)
    assert plan(Scaled(**keys), "generate", **asked) == want


def test_plan_refuses_what_the_cluster_can_never_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "capacity", lambda: {"CPU": 4.0, "GPU": 0.0})
    with pytest.raises(ConfigError, match=r"generate.workers=3 with generate.cpus_per_worker=2 asks for 6 CPUs; .* can grow to, 4"):
        plan(Scaled(workers=3, cpus_per_worker=2), "generate")
    with pytest.raises(ConfigError, match=r"generate.workers=1 with generate.gpus_per_worker=1 asks for 1 GPUs"):
        plan(Scaled(workers=1, gpus_per_worker=1), "generate")


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
