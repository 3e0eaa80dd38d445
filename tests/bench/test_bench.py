"""Cells of a bench: measured once, and again where what they hang on changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making.tiny_run import make_run

from retrikt_ray import pipeline
from retrikt_ray.bench import bench as module
from retrikt_ray.bench.bench import bench
from retrikt_ray.bench.settings import BenchConfig
from retrikt_ray.config import RunConfig
from retrikt_ray.report.baselines import System
from retrikt_ray.report.material import Material
from retrikt_ray.runtime.folders import Folder

CONFIG = BenchConfig(tasks={"tiny": {}}, seeds=[0, 1], groups=["labels", "teacher"])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(group, seed, rows of the store) of every group that was fitted; its one system says the first class to all."""
    calls: list[tuple[str, int, int]] = []

    def group(name: str) -> Any:
        def fit(material: Material) -> dict[str, System]:
            calls.append((name, material.seed, len(material.rows)))
            return {f"{name}_one": System(lambda texts: np.tile([0.2, 0.8], (len(texts), 1)), 5)}

        return fit

    def made(config: BenchConfig, root: Folder, task: str, seed: int) -> pipeline.Run:
        folder = root / task / f"seed-{seed}"
        if not folder.exists("config.yaml"):
            make_run(folder.uri, seed=seed)
            (folder / "task").write_table("test.parquet", (folder / "task").read_table("validation.parquet"))
        return pipeline.Run(folder, RunConfig())

    monkeypatch.setattr(module, "GROUPS", {name: group(name) for name in ("labels", "teacher")})
    monkeypatch.setattr(module, "made", made)
    monkeypatch.setattr(module.cluster, "connect", lambda *_: None)
    monkeypatch.setattr(module, "plan", lambda *_: None)
    return calls


def test_cells_are_measured_once(measured: list[Any], tmp_path: Path) -> None:
    first = bench(CONFIG, str(tmp_path))
    assert len(first) == 2 * 2 * 2 == len(measured)  # seeds, protocols, groups
    assert {(c["task"], c["metric"]) for c in first} == {("tiny", "accuracy")}
    assert [c["scores"] for c in first if c["group"] == "labels"] == [{"labels_one": 1.0}] * 4  # all three rows are of class 1
    assert first[0]["numbers"] == {"labels_one": 5}
    assert bench(CONFIG, str(tmp_path)) == first and len(measured) == 8


def test_what_changed_is_measured_again(measured: list[Any], tmp_path: Path) -> None:
    bench(CONFIG, str(tmp_path))
    make_run(tmp_path / "tiny" / "seed-1", seed=7)  # another store
    task = Folder.at(tmp_path) / "tiny" / "seed-1" / "task"
    task.write_table("test.parquet", task.read_table("validation.parquet"))
    (tmp_path / "cells" / "tiny-seed-0-generated-teacher.json").unlink()
    measured.clear()
    bench(CONFIG, str(tmp_path))
    assert sorted((group, seed) for group, seed, _ in measured) == [("labels", 1)] * 2 + [("teacher", 0)] + [("teacher", 1)] * 2


def test_generated_only_leaves_unlabelled_texts_out(measured: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SOURCES, "generated", ("task",))  # the tiny store has task and generated rows, turn by turn
    bench(CONFIG, str(tmp_path))
    assert {rows for _, _, rows in measured} == {6, 12}
