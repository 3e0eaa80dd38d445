"""A training of so many steps on one worker of the cluster: `python train_run.py SCRATCH OUT STEPS`. What it learnt is in OUT/learnt.json."""

from __future__ import annotations

import sys
import time
from typing import Any

from retrikt_ray.runtime import cluster
from retrikt_ray.runtime.cluster import Workers
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.training import launch


def loop(config: dict[str, Any]) -> None:
    import torch

    from retrikt_ray.runtime.training import Session

    weight = torch.nn.Parameter(torch.zeros(3))
    session = Session(config, torch.optim.AdamW([weight], 1e-3), {"weight": weight}, config["steps"])
    for step in range(session.start, config["steps"]):
        session.set_rate(step)
        (weight - torch.arange(3)).pow(2).sum().backward()
        session.update()
        time.sleep(0.01)
        session.done(step + 1)
    config["out"].write_json("learnt.json", weight.tolist())


if __name__ == "__main__":
    scratch, out, steps = sys.argv[1:]
    cluster.connect()
    launch(loop, {"seed": 0, "steps": int(steps), "out": Folder.at(out)}, Workers(1, 2, 0), Folder.at(scratch), "drill", "drill")
