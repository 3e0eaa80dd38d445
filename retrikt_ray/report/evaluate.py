"""Stage 9, evaluate: teacher, RetriKT and every baseline on the whole test split, and the report.

Systems are fitted and asked in parallel Ray tasks; the teacher, the slow one, answers through an actor pool. Nothing here is chosen on test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from retrikt_ray.report.advice import advise
from retrikt_ray.report.facts import numbers, voices
from retrikt_ray.report.material import Material
from retrikt_ray.report.systems import BY_NAME, SYSTEMS, part_of_store
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.cluster import Workers, each, plan, pool
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import Scaled
from retrikt_ray.store.card import store_card
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import Text, texts_of

VERSION = 4
CHUNK = 256  # test rows that an actor of the teacher's pool answers at a time
PART = "store:"  # the name of RetriKT on a part of the store begins so, and ends with the fraction
EXAMPLE_NEIGHBOURS = 4


class EvaluateConfig(Scaled):
    """What the report holds."""

    baselines: bool = Field(True, description="Fit the baselines; off, the report has teacher, retrikt and student_kd_store only.")
    store_fractions: list[float] = Field(
        [0.25, 0.5], description="Parts of the store to train on, for the curve of score against store size."
    )
    examples: int = Field(8, ge=0, description="Test rows shown with their neighbours.")
    latency_texts: int = Field(50, ge=1, description="Texts, one at a time, that latency is the median of.")


@dataclass(frozen=True)
class Asked:
    """What a system answered to the test rows, and what it costs."""

    answers: np.ndarray  # (N, C) probabilities, or (N, 1) values
    parameters: int
    latency_ms: float
    rows: int = 0  # of the store that it was fitted to, where that is a part


def evaluate(config: EvaluateConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `report/`: report.json, report.html, predictions.parquet.

    1. Ask the teacher and every system.  2. Compare what they answered.  3. Write.
    """
    workers = plan(config, "evaluate")
    # 1. ask
    asked = ask(config, inputs, seed, workers)
    # 2. compare
    material = Material(inputs, seed, workers.threads)
    report = compare(inputs, asked, seed)
    report["examples"] = each(examples_of, [(inputs, config.examples, workers.threads)], workers, "evaluate: examples")[0]
    report["store"] = each(store_card, [(inputs["store"], inputs["rejected"], material.task, seed)], workers, "evaluate: store")[0]
    report["voices"], report["store_side"] = each(of_knowledge, [(material,)], workers, "evaluate: voices")[0]
    report["advice"] = advise(report)
    # 3. write
    write(report, asked, inputs["task"], out["report"])
    scores = {
        name: round(part["score"]["mean"], 4) for name, part in (("retrikt", report["systems"]["retrikt"]), ("teacher", report["teacher"]))
    }
    return scores | {"metric": report["metric"]}


def ask(config: EvaluateConfig, inputs: dict[str, Folder], seed: int, workers: Workers) -> dict[str, Asked]:
    """What the teacher, every system, and RetriKT on parts of the store answer to the test rows, by name.

    Latencies are taken while as many systems run side by side as there are workers.
    """
    import ray

    table = inputs["task"].read_table("test.parquet")
    chunks = [{"start": start} for start in range(0, len(table), CHUNK)]
    answers = np.zeros((len(table), Task.read(inputs["task"]).outputs))
    with track("evaluate: teacher", len(table), "rows") as progress:
        for row in pool(TeacherAnswers, (inputs["teacher"], inputs["task"], workers.threads), chunks, workers):
            answers[int(row["row"])] = row["answer"]
            progress.advance()
    parts = [f"{PART}{f}" for f in config.store_fractions if 0 < f < 1]
    names = [*parts, *(s.name for s in SYSTEMS if config.baselines or not s.baseline)]
    material = Material(inputs, seed, workers.threads)
    found = each(fit_and_ask, [(name, material, config.latency_texts) for name in names], workers, "evaluate: systems")
    latency = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(teacher_latency)
    teacher_ms = ray.get(latency.remote(inputs["teacher"], texts_of(table), config.latency_texts, workers.threads))
    teacher = Asked(answers, inputs["teacher"].read_json("teacher.json")["parameters"], teacher_ms)
    return {"teacher": teacher} | dict(zip(names, found, strict=True))


class TeacherAnswers:
    """A Ray Data actor: the annotator's answers for chunks of test rows."""

    def __init__(self, teacher: Folder, task: Folder, threads: int) -> None:
        import torch

        from retrikt_ray.teacher.annotator import Annotator

        torch.set_num_threads(threads)
        self.annotator, self.texts = Annotator.load(teacher), texts_of(task.read_table("test.parquet"))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [i for start in batch["start"].tolist() for i in range(start, min(start + CHUNK, len(self.texts)))]
        return {"row": np.array(rows), "answer": self.annotator.annotate([self.texts[i] for i in rows])[0].numpy()}


def fit_and_ask(name: str, material: Material, latency_texts: int) -> Asked:
    """Fit one system and ask it the test rows (a Ray task). name: one of SYSTEMS, or PART and a fraction of the store."""
    import torch

    torch.set_num_threads(material.threads)
    texts, _ = material.split("test")
    if name.startswith(PART):
        system, rows = part_of_store(material, float(name.removeprefix(PART)))
        return Asked(system.answer(texts), system.parameters, 0.0, rows)
    system = BY_NAME[name].fit(material)
    return Asked(system.answer(texts), system.parameters, one_by_one_ms(system.answer, texts, latency_texts))


def teacher_latency(teacher: Folder, texts: list[Text], count: int, threads: int) -> float:
    import torch

    from retrikt_ray.teacher.annotator import Annotator

    torch.set_num_threads(threads)
    return one_by_one_ms(Annotator.load(teacher).annotate, texts, count)


def one_by_one_ms(answer: Callable[[list[Text]], Any], texts: list[Text], count: int) -> float:
    """Median time of one text in milliseconds, after a warm-up."""
    answer(texts[:1])
    times = []
    for text in texts[:count]:
        began = time.perf_counter()
        answer([text])
        times.append(time.perf_counter() - began)
    return float(np.median(times) * 1e3)


def compare(inputs: dict[str, Folder], asked: dict[str, Asked], seed: int) -> dict[str, Any]:
    """The content of report.json, but for the examples: scores with intervals, paired differences, and what the other artifacts tell."""
    from retrikt_ray.task.metrics import bootstrap_ci95, paired_ci95, reliability, score

    task = Task.read(inputs["task"])
    truth, metric = np.array(inputs["task"].read_table("test.parquet")["value"].to_pylist()), task.metric

    def scored(name: str) -> dict[str, Any]:
        value = score(metric, truth, asked[name].answers)
        return {"mean": value, "ci95": bootstrap_ci95(metric, truth, asked[name].answers), "per_seed": [value]}

    def costed(name: str) -> dict[str, Any]:
        return {"score": scored(name), "parameters": asked[name].parameters, "latency_ms": asked[name].latency_ms}

    systems = {s.name: costed(s.name) for s in SYSTEMS if s.name in asked}
    paired = {}
    for name in ["teacher", *(n for n in systems if n != "retrikt")]:
        difference, half = paired_ci95(metric, truth, asked["retrikt"].answers, asked[name].answers)
        paired[name] = {"difference": difference, "ci95": half}
    better = None
    if "tfidf_labels" in asked:
        difference, half = paired_ci95(metric, truth, asked["teacher"].answers, asked["tfidf_labels"].answers)
        better = {"difference": difference, "ci95": half}
    teacher, kept = inputs["teacher"].read_json("teacher.json"), inputs["store"].read_json("store.json")["kept"]
    parts = sorted((name for name in asked if name.startswith(PART)), key=lambda name: asked[name].rows)
    sizes = [{"rows": asked[name].rows, "score": score(metric, truth, asked[name].answers)} for name in parts]
    bins, error = ([], None) if task.regression else reliability(truth, asked["retrikt"].answers)
    stages = [check(inputs[name], only=[]) for name in ("task", "teacher", "policy", "store", "student", "index")]
    return {
        "task": task.name,
        "problem": task.problem,
        "labels": list(task.labels),
        "metric": metric,
        "seeds": [seed],
        "ci95_of": "test rows",
        "rows": {s: inputs["task"].read_table(f"{s}.parquet", ["id"]).num_rows for s in ("train", "validation", "test", "unlabelled")},
        "teacher": {"name": teacher["annotator"], "generator": teacher["base"]} | costed("teacher"),
        "systems": systems,
        "paired": paired,
        "teacher_over_tfidf": better,
        "rl": learning_curves(inputs["policy"]),
        "store_size": [*sizes, {"rows": kept, "score": systems["retrikt"]["score"]["mean"]}],
        "mixture": inputs["index"].read_json("mixture.json"),
        "unseen": inputs["index"].read_json("unseen.json"),
        "learnt": {"student": inputs["student"].read_json("learnt.json"), "ngrams": inputs["index"].read_json("index.json")["ngrams"]},
        "reliability": bins,
        "ece": error,
        "seconds": {manifest.stage: manifest.seconds for manifest in stages},
    }


def of_knowledge(material: Material) -> tuple[dict[str, Any], dict[str, int]]:
    """What each voice did to the answers, and how large the knowledge is (a Ray task)."""
    import torch

    torch.set_num_threads(material.threads)
    return voices(material), numbers(material)


def learning_curves(policy: Folder) -> dict[str, Any]:
    """What the report shows of reinforcement; nothing where there was none."""
    curves = policy.read_json("curves.json")
    curve, watch = curves["curve"], curves["watch"]
    if not curve:
        return {}

    def columns(points: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: [p[key] for p in points] for key in (points[0] if points else {}) if key != "step"}

    return {
        "steps": [p["step"] for p in curve],
        "terms": columns(curve),
        "watch_steps": [p["step"] for p in watch],
        "watch": columns(watch),
        "best_step": curves["best_step"],
        "collapse": curves["collapse"],
    }


def examples_of(inputs: dict[str, Folder], count: int, threads: int) -> list[dict[str, Any]]:
    """The first test rows with predictions and nearest neighbours (a Ray task)."""
    import torch

    torch.set_num_threads(threads)
    table = inputs["task"].read_table("test.parquet").slice(0, count)
    if not len(table):
        return []
    found = Material(inputs, 0, threads).predictor.answer(texts_of(table))
    assert found.dense is not None
    neighbours = found.view.neighbours(found.dense, "similarity", EXAMPLE_NEIGHBOURS)
    shown = []
    for row, label, score, near in zip(table.to_pylist(), found.labels, found.scores, neighbours, strict=True):
        rows = [{key: value for key, value in vars(n).items() if key != "bm25"} for n in near]
        shown.append({key: row[key] for key in ("text", "text_pair", "label")} | {"predicted": label, "score": score, "neighbours": rows})
    return shown


def write(report: dict[str, Any], asked: dict[str, Asked], task: Folder, out: Folder) -> None:
    """report.json, report.html, and what each system answered to each test row."""
    import pyarrow as pa

    from retrikt_ray.report.page import render

    out.write_json("report.json", report)
    out.write_bytes("report.html", render(report).encode())
    test = task.read_table("test.parquet", ["id", "label"])
    columns = {name: test[name].to_pylist() for name in ("id", "label")}
    columns |= {name: part.answers.tolist() for name, part in asked.items() if not name.startswith(PART)}
    out.write_table("predictions.parquet", pa.table(columns))
