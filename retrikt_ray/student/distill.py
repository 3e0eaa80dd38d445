"""Stage 7, distill: train the student on the store (Ray Train, one or more workers)."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrikt_ray.runtime.cluster import Workers, each, plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.tables import Source
from retrikt_ray.student.fit import DistillConfig
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import TEXT_COLUMNS, texts_of

if TYPE_CHECKING:
    import torch

    from retrikt_ray.runtime.training import Session

VERSION = 7
COUNTS = "tokens.json"  # how often each of the teacher's tokens occurs in the store
COUNT_ROWS = 50_000  # of which a task counts the tokens
LEARNT = "learnt.json"  # which sources a student has learnt from, and its loss on the unseen rows by the sources that were tried


def distill_loop(config: dict[str, Any]) -> None:
    """Train a student in a Ray Train worker; rank 0 writes it to `out`."""
    import torch

    from retrikt_ray.runtime.training import Session
    from retrikt_ray.student.fit import fit, unseen_loss, untrained
    from retrikt_ray.student.rows import joined_rows, load_store, load_validation
    from retrikt_ray.teacher.base import pick_device

    torch.set_num_threads(config["threads"])
    c, seed = DistillConfig(**config["section"]), config["seed"]
    rows, held = load_store(config["store"], seed, config["sources"])
    student = untrained(c, config["teacher"], config["counts"], config["task"].pair, seed)
    torch.nn.Module.to(student.model, pick_device())

    def session_of(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], total: int) -> Session:
        return Session(config, optimizer, tensors, total)

    unseen = joined_rows([load_validation(config["task_folder"], held.teacher.shape[1]), held])
    session = fit(student, rows, unseen, c, seed, session_of)
    if session.rank == 0:
        with tempfile.TemporaryDirectory() as name:
            student.save(name)
            config["out"].upload(Path(name))
        config["out"].write_json(LEARNT, {"sources": config["sources"], "loss": {named(config["sources"]): unseen_loss(student, unseen)}})


def count_run(teacher: Folder, store: Source, low: int, high: int) -> Counter[int]:
    """How often each token occurs in the store's rows low .. high - 1 (a Ray task)."""
    from retrikt_ray.student.inherit import count_tokens
    from retrikt_ray.teacher.annotator import tokenizer_of

    return count_tokens(tokenizer_of(teacher), (texts_of(table) for _, table in store.read(low, high, TEXT_COLUMNS)))


def token_counts(inputs: dict[str, Folder], scratch: Folder, workers: Workers) -> Counter[int]:
    """How often each token occurs in the store: of a large one counted in tasks, on the CPUs of the training. Kept for a run that goes on."""
    if not scratch.exists(COUNTS):
        source, total = Source.of(inputs["store"]), Counter[int]()
        calls = [(inputs["teacher"], source, low, low + COUNT_ROWS) for low in range(0, source.rows, COUNT_ROWS)]
        several = Workers(max(1, int(workers.count * workers.cpus)), min(1, workers.cpus), 0) if len(calls) > 1 else None
        for counts in each(count_run, calls, several, "distill: tokens"):
            total.update(counts)
        scratch.write_json(COUNTS, sorted(total.items()))
    return Counter(dict(scratch.read_json(COUNTS)))


def named(sources: Sequence[str]) -> str:
    return " and ".join(sources) or "all"


def distill(config: DistillConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `student/` in Hugging Face layout (config.json, model.safetensors, tokenizer files), and learnt.json.

    1. Count the tokens of the store.  2. A student from all rows and, where this is tried (`courses`), one from the domain's own.  3. The one
    with the smaller loss on unseen rows.
    """
    from retrikt_ray.runtime.training import launch
    from retrikt_ray.student.model import Student
    from retrikt_ray.student.rows import courses, sources_of

    common = {
        "section": config.model_dump(),
        "task": Task.read(inputs["task"]),
        "task_folder": inputs["task"],
        "store": inputs["store"],
        "teacher": inputs["teacher"],
        "seed": seed,
    }
    workers, scratch, tried = plan(config, "distill", cpus=2, grow=False), out["scratch"], courses(sources_of(inputs["store"]))
    # 1. a pre-trained student has a vocabulary of its own
    common["counts"] = Counter() if config.model else token_counts(inputs, scratch, workers)
    # 2. one or two
    names = ["student-own" if sources else "student" for sources in tried]
    places = [scratch / f"{name}-made" for name in names] if len(tried) > 1 else [out["student"]]
    for name, sources, place in zip(names, tried, places, strict=True):
        if not place.exists(LEARNT):
            launch(distill_loop, common | {"sources": sources, "out": place}, workers, scratch, name, "distill: student")
    # 3. the better one
    found = [place.read_json(LEARNT) for place in places]
    losses = {name: loss for one in found for name, loss in one["loss"].items()}
    best = min(range(len(found)), key=lambda i: losses[named(tried[i])])
    if len(tried) > 1:
        out["student"].upload(places[best].local())
    out["student"].write_json(LEARNT, {"sources": tried[best], "loss": losses})
    model = Student.load(str(out["student"].local())).model
    teacher = inputs["teacher"].read_json("teacher.json")["parameters"]
    return {
        "parameters": model.parameter_count,
        "of_teacher": f"{model.parameter_count / teacher:.2%}",
        "rows": inputs["store"].read_json("store.json")["kept"],
    } | ({"learnt_from": named(tried[best])} if len(tried) > 1 else {})
