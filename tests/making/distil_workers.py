"""Trains a tiny student for a few steps on 1, 2 or more gloo workers, and writes the weights of each: `distil_workers.py FOLDER 1 2 4`.

`steps`: batches of which each worker has one row after another. `groups`: those of a store larger than what is kept in memory.
"""

from __future__ import annotations

import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from making.tiny_run import TEXTS, make_student
from retrikt_ray.runtime import training
from retrikt_ray.student import rows as reading
from retrikt_ray.student.fit import DistillConfig, distillation
from retrikt_ray.student.rows import Batches, Rows

reading.WINDOW = 3
BATCHES: dict[str, training.Batches] = {
    "steps": training.Steps([[0, 3, 6, 7, 11, 1, 8, 2], [4, 9, 10], [5, 2, 7, 8, 1, 0], [3], [6, 2]]),  # fewer rows than workers, too
    "groups": Batches(np.split(np.arange(12), [2, 5, 6, 9, 11]), 5, 2, 0),
}


class Team(training.Solo):
    """A worker of several, without Ray."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, rank: int, world: int) -> None:
        super().__init__(optimizer, steps, 0)
        self.rank, self.world = rank, world


def train(rank: int, world: int, folder: Path, name: str, **weights: float) -> None:
    sure = torch.tensor([0.9 - 0.05 * i for i in range(6)] + [0.1 + 0.05 * i for i in range(6)])
    known = torch.tensor([float(i < 6) if i % 3 else math.nan for i in range(12)])
    embeddings = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    rows = Rows([(text, None) for text in TEXTS], torch.stack([1 - sure, sure], 1), embeddings, known)
    for deal, batches in BATCHES.items():
        student = make_student(False, 2, 0)
        team = Team(torch.optim.SGD(student.model.parameters(), lr=0.5), len(batches), rank, world)
        sizes = [[len(part) for part in batches.parts(step, world)] for step in range(len(batches))]
        loss_of = distillation(student, rows, DistillConfig(token_dropout=0, **weights), team, sizes.__getitem__)
        training.run(team, batches, loss_of, together=True)
        if rank == 0:
            save_file({k: v.detach().clone() for k, v in student.model.named_parameters()}, folder / f"{deal}-{name}.safetensors")


def main(folder: Path, worlds: list[int]) -> None:
    torch.set_num_threads(1)
    train(0, 1, folder, "plain", relation=0, retrieval=0)
    for world in worlds:
        children = []
        for rank in range(world):
            children.append(os.fork())
            if children[-1] == 0:
                dist.init_process_group(
                    "gloo", f"file://{folder}/group-{world}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
                )
                train(rank, world, folder, str(world))
                os._exit(0)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children), world


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(world) for world in sys.argv[2:]])
