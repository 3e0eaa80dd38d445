"""Benchmark of what is written: `python -m jobs.bench_texts [TASK ...]`, of quickstart, sst2 and trec. The figures of docs/benchmarks.md come from here.

240 texts of each task, behind the prompts that the task's labelled rows taught, with and without their first token drawn as the rows begin (`begin_like`): the
same seeds on both sides. How many begin with a letter or number, what share of the labelled rows' distribution over Unicode categories of the first character
theirs covers (1: they begin just alike), and how many the teacher labels as they were asked to be. sst2 and trec are read from $RETRIKT_DATA/data/TASK.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import torch

from retrikt_ray import config, pipeline
from retrikt_ray.store.engines import Order, TransformersEngine
from retrikt_ray.store.generate import row_seed
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import Text, split_pair, texts_of
from retrikt_ray.teacher.annotator import Annotator
from retrikt_ray.teacher.base import start_of
from retrikt_ray.teacher.prompts import load_prompts
from retrikt_ray.teacher.sampling import Sampling

TEXTS = 240
DATA = os.environ.get("RETRIKT_DATA", "../shared") + "/data"
TASKS: dict[str, tuple[str | None, list[str]]] = {
    "quickstart": (None, []),
    "sst2": ("jobs/sst2.yaml", [f"prepare.data={DATA}/sst2", "prepare.subset=null", "prepare.text_column=text"]),
    "trec": ("jobs/trec.yaml", [f"prepare.data={DATA}/trec", "prepare.label_column=label", "prepare.revision=null"]),
}


def begins(texts: list[Text]) -> dict[str, float]:
    """Share of the texts by the category of their first character."""
    counts = Counter(start_of(text) for text, _ in texts)
    return {name: count / len(texts) for name, count in counts.items()}


def alike(rows: dict[str, float], texts: dict[str, float]) -> float:
    """What two distributions have in common, 0 to 1."""
    return sum(min(share, texts.get(name, 0.0)) for name, share in rows.items())


def letters(shares: dict[str, float]) -> float:
    return sum(share for name, share in shares.items() if name[:1] in ("L", "N"))


def texts_of_task(name: str) -> dict[str, Any]:
    """What one task's texts are like."""
    path, overrides = TASKS[name]
    run = pipeline.open_run(f"runs/bench-texts/{name}", config.load(path, [*overrides, "reinforce.steps=0"]))
    for stage in ("prepare", "teach", "reinforce"):
        pipeline.run_all(run, only=stage)
    torch.set_num_threads(1)
    task, teacher, c = Task.read(run.artifact("task")), run.artifact("teacher"), run.config.generate
    card, annotator = teacher.read_json("teacher.json"), Annotator.load(teacher)
    conditions = [i % len(task.conditions) for i in range(TEXTS)]
    seeds = [row_seed(run.config.seed, 0, i) for i in range(TEXTS)]
    rows = begins(texts_of(run.artifact("task").read_table("train.parquet")))
    found: dict[str, Any] = {"rows": {"letters": letters(rows), "begins": rows}}
    sampling = Sampling(c.temperature, c.top_k, c.top_p)
    for side, starts in (("before", {}), ("after", card["starts"])):
        prompts = load_prompts(run.artifact("policy"))
        order = Order(
            card["base"], card["dtype"], card["chat"], prompts, task.prefixes, card["max_tokens"], task.lines, sampling, 0, starts
        )
        made = [split_pair(text.text, task.pair) for text in TransformersEngine(order).generate(conditions, seeds)]
        shares = begins(made)
        asked = [(text, condition) for text, condition in zip(made, conditions, strict=True) if text[0] and text[1] != ""]
        labels = annotator.annotate([text for text, _ in asked])[0].argmax(1).tolist()
        agree = sum(label == condition for label, (_, condition) in zip(labels, asked, strict=True)) / len(asked)
        found[side] = {"letters": letters(shares), "alike": alike(rows, shares), "agreement": agree, "begins": shares}
        found[side]["first"] = [text for text, _ in made[: 2 * len(task.conditions)]]
    return found


def main() -> None:
    names = sys.argv[1:] or list(TASKS)
    if unknown := set(names) - TASKS.keys():
        raise SystemExit(f"unknown tasks {', '.join(sorted(unknown))}; known: {', '.join(TASKS)}")
    result = {name: texts_of_task(name) for name in names}
    print(
        "| | rows: letter or number | texts before | after | alike before | after | as asked before | after |\n|---|---|---|---|---|---|---|---|"
    )
    for name, found in result.items():
        sides = (found["before"], found["after"])
        figures = [found["rows"]["letters"], *(s["letters"] for s in sides), *(s["alike"] for s in sides), *(s["agreement"] for s in sides)]
        print(f"| {name} | {' | '.join(f'{100 * figure:.1f}' for figure in figures)} |")
    for name, found in result.items():
        print(f"\n{name}, after:", *(repr(text) for text in found["after"]["first"]), sep="\n  ")
    if "OUT" in os.environ:
        with open(f"{os.environ['OUT']}/bench_texts.json", "w") as file:
            json.dump(result, file, indent=1)
    missed = [name for name, found in result.items() if found["after"]["letters"] < found["rows"]["letters"] - 0.05]
    if missed:
        raise SystemExit(f"texts begin otherwise than the rows by more than 5 points: {', '.join(missed)}")


if __name__ == "__main__":
    main()
