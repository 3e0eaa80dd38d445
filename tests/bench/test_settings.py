"""The config of a bench: each task's run, and what a user is told who got it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from retrikt_ray.bench import bench
from retrikt_ray.bench.bench import Cell, read
from retrikt_ray.bench.groups import GROUPS
from retrikt_ray.bench.settings import BenchConfig, load
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError

YAML = """
common:
  prepare: {data: $BENCH_DATA/sst2, n_per_class: 16}
  distill: {size: 0.02}
tasks:
  sst2: {}
  trec:
    prepare: {data: $BENCH_DATA/trec}
    distill: {epochs: 3}
seeds: [3, 4]
"""


def write(path: Path, text: str = YAML) -> str:
    (path / "bench.yaml").write_text(text)
    return str(path / "bench.yaml")


def test_a_tasks_run_is_its_own_keys_over_the_common_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA", "/somewhere")
    config = load(write(tmp_path))
    sst2, trec = config.run_config("sst2", 3), config.run_config("trec", 4)
    assert (sst2.prepare.data, sst2.prepare.name, sst2.prepare.n_per_class, sst2.seed) == ("/somewhere/sst2", "sst2", 16, 3)
    assert (trec.prepare.data, trec.prepare.name, trec.prepare.n_per_class, trec.seed) == ("/somewhere/trec", "trec", 16, 4)
    assert (sst2.distill.size, trec.distill.size, trec.distill.epochs) == (0.02, 0.02, 3) and sst2.distill.epochs != 3
    assert config.groups == [name for name in GROUPS if name != "model"] and config.protocols == ["generated", "unlabelled"]
    assert config.common["prepare"]["data"] == "/somewhere/sst2"  # a task's keys stay its own


def test_overrides(tmp_path: Path) -> None:
    config = load(write(tmp_path), ["seeds=[7]", "groups=[retrikt, teacher]"])
    assert (config.seeds, config.groups) == ([7], ["retrikt", "teacher"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: [3, 4]", "groups: [retrikt, nobody]"), r"groups.*there is no group 'nobody'; there are teacher, retrikt, "),
        (("seeds: [3, 4]", "seeds: []"), r"seeds"),
        (("seeds: [3, 4]", "protocols: [all]"), r"protocols.*all"),
        (("seeds: [3, 4]", "seed: 3"), r"bench\.yaml.*seed"),
        (("distill: {epochs: 3}", "distill: {epoch: 3}"), r"tasks\.trec.*distill\.epoch\b"),
        (("distill: {size: 0.02}", "distill: {size: 2}"), r"tasks\.sst2.*distill\.size"),
        (("  sst2: {}", "  sst2: {destill: {}}"), r"tasks\.sst2.*destill"),
        (("prepare: {data: $BENCH_DATA/trec}", "prepare: {data: x, n_per_class: many}"), r"tasks\.trec.*n_per_class"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in YAML
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load(write(tmp_path, YAML.replace(*change)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such config file"):
        load(str(tmp_path / "nothing.yaml"))


def test_the_job_of_the_repository_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRIKT_DATA", "RETRIKT_ENCODER"):
        monkeypatch.setenv(name, "/somewhere")
    config = load(str(Path(__file__).parents[2] / "jobs" / "bench.yaml"))
    assert len(config.tasks) >= 2 and "$" not in str([config.run_config(task, 0) for task in config.tasks])


def test_a_cell_is_read_while_its_fingerprint_holds(tmp_path: Path) -> None:
    """What was interrupted goes on: a cell that was measured of this very store is not measured again."""
    root, cell = Folder.at(tmp_path), Cell("trec", 1, "generated", "labels")
    assert cell.file == "trec-seed-1-generated-labels.json" and read(root, cell, "a") is None
    (root / "cells").write_json(cell.file, {"fingerprint": "a", "scores": {}})
    assert read(root, cell, "a") == {"fingerprint": "a", "scores": {}} and read(root, cell, "b") is None
    assert set(bench.SOURCES) == set(get_args(get_args(BenchConfig.model_fields["protocols"].annotation)[0]))
