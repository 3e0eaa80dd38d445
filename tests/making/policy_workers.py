"""Reinforces a tiny prompt on 1, 2 or more gloo workers, and writes curves and prompts of each: `policy_workers.py FOLDER LM ALGORITHM 1 2 3`."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from making.policy_run import MAX_TOKENS, SEED, make_task
from retrikt_ray.policy.loop import Agent
from retrikt_ray.policy.reinforce import ReinforceConfig, train
from retrikt_ray.policy.reward_model import RewardModel
from retrikt_ray.runtime import training
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.teacher import prompts
from retrikt_ray.teacher.annotator import Annotator
from retrikt_ray.teacher.base import Base
from retrikt_ray.teacher.sampling import Sampling


class Team(training.Solo):
    """A worker of several, without Ray."""

    notes: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, optimizer: torch.optim.Optimizer, total: int, rank: int, world: int) -> None:
        super().__init__(optimizer, total, SEED)
        self.rank, self.world = rank, world


def work(rank: int, world: int, folder: Path, lm: str, algorithm: str) -> None:
    # Nine texts in minibatches of four: 2, 3 and 5 workers have unequal shares of both. Seven held-out ones.
    c = ReinforceConfig(algorithm=algorithm, steps=2, texts=9, minibatch=4, epochs=2, watch_every=1, watch_texts=7, learning_rate=0.02)
    root, task, base = Folder.at(folder), make_task(), Base.load(lm)
    prompt = prompts.load_prompts(root / "teacher")
    agent = Agent(base, prompt, task.prefixes, MAX_TOKENS, task.lines, SEED, Sampling(c.temperature, c.top_k), c.algorithm)
    team = Team(agent.optimizer(c.learning_rate, c.value_learning_rate), c.steps, rank, world)
    rows = (root / "task").read_table("train.parquet")
    history = train(c, agent, RewardModel(base, Annotator.load(root / "teacher", base), task, rows, c.weights, {}), team)  # type: ignore[arg-type]
    if rank == 0:
        (folder / f"{algorithm}-{world}.json").write_text(json.dumps(history.to_json()))
        save_file({"policy": agent.policy().detach().contiguous(), "best": agent.best}, folder / f"{algorithm}-{world}.safetensors")


def main(folder: Path, lm: str, algorithm: str, worlds: list[int]) -> None:
    torch.set_num_threads(1)
    for world in worlds:
        children = []
        for rank in range(world):
            children.append(os.fork())
            if children[-1] == 0:
                if world > 1:
                    place = f"file://{folder}/group-{algorithm}-{world}"
                    dist.init_process_group("gloo", place, rank=rank, world_size=world, timeout=timedelta(seconds=120))
                work(rank, world, folder, lm, algorithm)
                os._exit(0)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children), world


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], [int(world) for world in sys.argv[4:]])
