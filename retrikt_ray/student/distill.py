"""Stage 7, distill: train the student on the store (Ray Train, one or more workers)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrikt_ray.runtime.cluster import plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.student.fit import DistillConfig
from retrikt_ray.task.card import Task

if TYPE_CHECKING:
    import torch

    from retrikt_ray.runtime.training import Session

VERSION = 6


def distill_loop(config: dict[str, Any]) -> None:
    """Train the student in a Ray Train worker; rank 0 writes `student/`."""
    import torch

    from retrikt_ray.runtime.training import Session
    from retrikt_ray.student.fit import fit, untrained
    from retrikt_ray.student.rows import joined_rows, load_store, load_validation
    from retrikt_ray.teacher.base import pick_device

    torch.set_num_threads(config["threads"])
    c, seed = DistillConfig(**config["section"]), config["seed"]
    rows, held = load_store(config["store"], seed)
    student = untrained(c, config["teacher"], rows, config["task"].pair, seed)
    torch.nn.Module.to(student.model, pick_device())

    def session_of(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], total: int) -> Session:
        return Session(config, optimizer, tensors, total)

    unseen = joined_rows([load_validation(config["task_folder"], held.teacher.shape[1]), held])
    session = fit(student, rows, unseen, c, seed, session_of)
    if session.rank == 0:
        with tempfile.TemporaryDirectory() as name:
            student.save(name)
            config["out"].upload(Path(name))


def distill(config: DistillConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `student/` in Hugging Face layout (config.json, model.safetensors, tokenizer files)."""
    from retrikt_ray.runtime.training import launch
    from retrikt_ray.student.model import Student

    common = {
        "section": config.model_dump(),
        "task": Task.read(inputs["task"]),
        "task_folder": inputs["task"],
        "store": inputs["store"],
        "teacher": inputs["teacher"],
        "out": out["student"],
        "seed": seed,
    }
    launch(distill_loop, common, plan(config, "distill", cpus=2, grow=False), out["scratch"], "student", "distill: student")
    model = Student.load(str(out["student"].local())).model
    teacher = inputs["teacher"].read_json("teacher.json")["parameters"]
    return {
        "parameters": model.parameter_count,
        "of_teacher": f"{model.parameter_count / teacher:.2%}",
        "rows": inputs["store"].read_json("store.json")["kept"],
    }
