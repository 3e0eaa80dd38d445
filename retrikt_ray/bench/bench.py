"""`retrikt bench`: tasks x seeds x protocols x groups of systems, each cell a file, so that what was interrupted goes on where it was.

OUT/TASK/seed-N/ is a run up to its store, made by the run's own stages; OUT/cells/TASK-seed-N-PROTOCOL-GROUP.json what the systems of a group
score on its test split. Teacher and store are made once a task and seed, with all the sources that the config names; a protocol takes the rows of
some of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from retrikt_ray import pipeline
from retrikt_ray.bench.groups import GROUPS
from retrikt_ray.bench.settings import BenchConfig
from retrikt_ray.report.material import Material
from retrikt_ray.runtime import cluster
from retrikt_ray.runtime.artifacts import read_manifest
from retrikt_ray.runtime.cluster import each, plan
from retrikt_ray.runtime.folders import Folder, digest
from retrikt_ray.runtime.progress import console
from retrikt_ray.runtime.settings import Scaled

VERSION = 3  # raise when a baseline would score otherwise on the same store
STAGES = ("prepare", "teach", "reinforce", "generate", "harvest", "annotate")
INPUTS = ("task", "teacher", "store")
SOURCES: dict[str, tuple[str, ...]] = {  # of the store's rows, by protocol
    "generated": ("task", "generated"),
    "unlabelled": ("task", "generated", "unlabelled"),
    "corpus": ("task", "corpus"),
    "corpus_generated": ("task", "corpus", "generated"),
}


@dataclass(frozen=True)
class Cell:
    """What one task, or a part of it, measures."""

    task: str
    seed: int
    protocol: str
    group: str

    @property
    def file(self) -> str:
        return f"{self.task}-seed-{self.seed}-{self.protocol}-{self.group}.json"


def bench(config: BenchConfig, out: str) -> list[dict[str, Any]]:
    """Make what is missing, and return all cells: {task, seed, protocol, group, metric, scores, numbers, seconds}.

    1. Runs up to the store.  2. Cells.
    """
    root = Folder.at(out)
    # 1. runs
    runs = {(task, seed): made(config, root, task, seed) for seed in config.seeds for task in config.tasks}
    # 2. cells
    cells = [Cell(task, seed, p, g) for task, seed in runs for p in config.protocols for g in config.groups]
    prints = {cell: fingerprint(cell, runs[cell.task, cell.seed]) for cell in cells}
    found = {cell: known for cell in cells if (known := read(root, cell, prints[cell]))}
    missing = [cell for cell in cells if cell not in found]
    if missing:
        cluster.connect(None, runs[missing[0].task, missing[0].seed].config.cluster)
        workers = plan(Scaled(), "bench")  # one thread a cell: they are small
        calls = [(cell, runs[cell.task, cell.seed], root, prints[cell]) for cell in missing]
        found |= dict(zip(missing, each(measure, calls, workers, "bench: cells"), strict=True))
    return [found[cell] for cell in cells]


def made(config: BenchConfig, root: Folder, task: str, seed: int) -> pipeline.Run:
    """The run of a task and seed, with a complete store."""
    run = pipeline.open_run((root / task / f"seed-{seed}").uri, config.run_config(task, seed))
    stages = [stage for stage in run.stages if stage.name in STAGES]
    if any(run.status(stage) != "done" for stage in stages):
        console.print(f"[bold]{task}, seed {seed}[/bold]")
        for stage in stages:
            pipeline.run_all(run, only=stage.name)
    return run


def fingerprint(cell: Cell, run: pipeline.Run) -> str:
    """What a cell's figures depend on: the store and its teacher, the student's config, and the code that makes students and indexes."""
    manifests = {name: read_manifest(run.artifact(name)) for name in INPUTS}
    contents = {name: manifest.content for name, manifest in manifests.items() if manifest}
    versions = [VERSION, *(pipeline.BY_NAME[name].module().VERSION for name in ("distill", "index"))]
    return digest({"cell": vars(cell), "versions": versions, "inputs": contents, "distill": run.config.distill.fingerprint_view()})


def read(root: Folder, cell: Cell, wanted: str) -> dict[str, Any] | None:
    """A cell that was measured, or None."""
    folder = root / "cells"
    if not folder.exists(cell.file):
        return None
    found: dict[str, Any] = folder.read_json(cell.file)
    return found if found["fingerprint"] == wanted else None


def measure(cell: Cell, run: pipeline.Run, root: Folder, mark: str) -> dict[str, Any]:
    """Fit a group's systems, ask them the test split, and write what they score (a Ray task)."""
    import torch

    from retrikt_ray.task.metrics import score

    torch.set_num_threads(1)
    began = time.time()
    material = Material({name: run.artifact(name) for name in INPUTS}, cell.seed, 1, SOURCES[cell.protocol], run.config.distill)
    texts, truth = material.split("test")
    metric = material.task.metric
    systems = GROUPS[cell.group](material)
    scores = {name: score(metric, truth, system.answer(texts)) for name, system in systems.items()}
    numbers = {name: system.parameters for name, system in systems.items()}
    result = vars(cell) | {"metric": metric, "scores": scores, "numbers": numbers, "seconds": round(time.time() - began, 1)}
    (root / "cells").write_json(cell.file, result | {"fingerprint": mark})
    return result | {"fingerprint": mark}
