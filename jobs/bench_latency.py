"""Latency of an answer beside the bare student's and the teacher's: `python -m jobs.bench_latency RUN`, on one thread of an idle machine.

All three answer the same test texts in turn, batch by batch, so that what disturbs the machine disturbs them alike; medians.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from retrikt_ray.predictor import Predictor
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.task.texts import texts_of
from retrikt_ray.teacher.annotator import Annotator

ROUNDS = {1: 300, 64: 30}  # by batch


def main() -> None:
    torch.set_num_threads(1)
    run = Folder.at(sys.argv[1])
    predictor, teacher = Predictor.open(run), Annotator.load(run / "teacher")
    texts = texts_of((run / "task").read_table("test.parquet"))
    print(
        f"{predictor.task.name}: {predictor.knowledge.count:,} rows, {predictor.student.model.parameter_count:,} parameters, {predictor.mixture}\n"
    )
    systems: dict[str, Callable[[Any], Any]] = {
        "student alone": predictor.student.encode,
        "RetriKT": lambda some: predictor.answer(some, evidence=False),
        "RetriKT with evidence": predictor.answer,
        "teacher": teacher.annotate,
    }
    print("| batch | " + " | ".join(f"{name}, ms" for name in systems) + " | RetriKT / student | teacher / RetriKT |")
    print("|---" * (len(systems) + 3) + "|")
    for batch, rounds in ROUNDS.items():
        times: dict[str, list[float]] = {name: [] for name in systems}
        for i in range(rounds):
            low = i * batch % (len(texts) - batch)
            for name, answer in systems.items():
                if name == "teacher" and i >= rounds // 5:
                    continue
                for repeat in range(2):  # the first call finds cold caches, which the one before left
                    began = time.perf_counter()
                    answer(texts[low : low + batch])
                    if repeat:
                        times[name].append(time.perf_counter() - began)
        ms = {name: float(np.median(found)) * 1e3 for name, found in times.items()}
        cells = " | ".join(f"{value:.3f}" for value in ms.values())
        print(f"| {batch} | {cells} | {ms['RetriKT'] / ms['student alone']:.2f} | {ms['teacher'] / ms['RetriKT']:.1f} |")


if __name__ == "__main__":
    main()
