"""The algorithms of reinforcement at equal numbers of texts: `python -m jobs.bench_algorithms [SEED ...]`. The figures of docs/benchmarks.md come from here.

The quick start's task and prompt; each algorithm has 6 iterations of 48 texts from the same supervised prompt, and is looked at by the same 192 held-out
texts, whose rewards are in the same units. The last look is shown, whether its prompt would be kept or not; `supervised` is the first. Seconds are those
of the whole stage, start of the worker and looks included.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import numpy as np

from retrikt_ray import config, pipeline
from retrikt_ray.policy.reinforce import Algorithm

OUT = "runs/bench-algorithms"
KEYS = ["reinforce.steps=6", "reinforce.texts=48", "reinforce.minibatch=24", "reinforce.watch_every=6", "reinforce.watch_texts=192"]
COLUMNS = {"fidelity": 2, "reward": 2, "kl": 1, "distinct_2": 3, "self_bleu": 3, "terminated": 2, "seconds": 0}


def taught(seed: int) -> pipeline.Run:
    """A run up to its supervised prompt."""
    run = pipeline.open_run(f"{OUT}/{seed}/taught", config.load(None, [f"seed={seed}"]))
    for stage in ("prepare", "teach"):
        pipeline.run_all(run, only=stage)
    return run


def reinforced(seed: int, algorithm: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last look of an algorithm at its held-out texts."""
    place = f"{OUT}/{seed}/{algorithm}"
    run = pipeline.open_run(place, config.load(None, [f"seed={seed}", f"reinforce.algorithm={algorithm}", *KEYS]))
    for name in ("task", "teacher"):
        shutil.copytree(f"{OUT}/{seed}/taught/{name}", f"{place}/{name}", dirs_exist_ok=True)
    pipeline.run_all(run, only="reinforce")
    policy = run.artifact("policy")
    looks = policy.read_json("curves.json")["watch"]
    return looks[0] | {"seconds": 0.0}, looks[-1] | {"seconds": policy.read_json("manifest.json")["seconds"]}


def main() -> None:
    seeds = [int(seed) for seed in sys.argv[1:]] or [0, 1]
    found: dict[str, list[dict[str, Any]]] = {"supervised": []}
    for seed in seeds:
        taught(seed)
        for algorithm in Algorithm.__args__:  # type: ignore[attr-defined]
            first, last = reinforced(seed, algorithm)
            found.setdefault(algorithm, []).append(last)
        found["supervised"].append(first)
    print(f"Means of seeds {', '.join(map(str, seeds))}, and the reward of each.\n")
    print(f"| | {' | '.join(COLUMNS)} | rewards |\n|---|{'---|' * (len(COLUMNS) + 1)}")
    for name, looks in found.items():
        means = [f"{np.mean([look[column] for look in looks]):.{places}f}" for column, places in COLUMNS.items()]
        rewards = [f"{look['reward']:.2f}" for look in looks]
        print(f"| {name} | {' | '.join(means)} | {' / '.join(rewards)} |")


if __name__ == "__main__":
    main()
