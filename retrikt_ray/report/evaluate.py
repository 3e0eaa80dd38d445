"""Stage 8, evaluate: teacher, RetriKT and every baseline on the whole test split, and the report.

Systems are fitted and asked in parallel Ray tasks; the teacher, the slow one, answers through Ray Data. Nothing here is chosen on test.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from pydantic import Field

from retrikt_ray.runtime.artifacts import read_manifest
from retrikt_ray.runtime.cluster import each, plan
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import track
from retrikt_ray.runtime.settings import Scaled

VERSION = 1
CHUNK = 256
BASELINES = ("student_kd_labels", "student_labels", "tfidf_store", "tfidf_labels", "majority")


class EvaluateConfig(Scaled):
    """What the report holds."""

    baselines: bool = Field(True, description="Fit the baselines; off, the report has teacher, retrikt and student_kd_store only.")
    store_fractions: list[float] = Field(
        [0.25, 0.5], description="Parts of the store to train on, for the curve of score against store size."
    )
    examples: int = Field(8, ge=0, description="Test rows shown with their neighbours.")
    latency_texts: int = Field(50, ge=1, description="Texts, one at a time, that latency is the median of.")


def one_by_one_ms(answer: Any, texts: list[Any], count: int) -> float:
    """Median time of one text in milliseconds, after a warm-up."""
    answer(texts[:1])
    times = []
    for text in texts[:count]:
        began = time.perf_counter()
        answer([text])
        times.append(time.perf_counter() - began)
    return float(np.median(times) * 1e3)


class TeacherAnswers:
    """A Ray Data actor: the annotator's answers for chunks of test rows."""

    def __init__(self, teacher_uri: str, threads: int) -> None:
        import torch

        from retrikt_ray.teacher.annotator import Classifier

        torch.set_num_threads(threads)
        self.model = Classifier.load(Folder(teacher_uri))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = list(zip(batch["text"], (p or None for p in batch["text_pair"]), strict=True))
        return {"row": batch["row"], "answer": self.model.annotate(texts)[0].numpy()}


def teacher_latency(teacher: Folder, texts: list[Any], count: int, threads: int) -> float:
    import torch

    from retrikt_ray.teacher.annotator import Classifier

    torch.set_num_threads(threads)
    return one_by_one_ms(Classifier.load(teacher).annotate, texts, count)


def texts_of(rows: list[dict[str, Any]]) -> list[Any]:
    return [(r["text"], r["text_pair"]) for r in rows]


def fit_and_ask(name: str, inputs: dict[str, Folder], seed: int, threads: int, latency_texts: int) -> dict[str, Any]:
    """Fit one system and ask it the test rows (a Ray task). name: a system of the report, or `store:FRACTION`.

    Returns {answers (N, C), parameters, latency_ms}.
    """
    import torch

    from retrikt_ray.index.lexical import Lexical, Postings
    from retrikt_ray.index.search import Searcher
    from retrikt_ray.predictor import Mixture, Predictor, Votes, mix
    from retrikt_ray.report import baselines
    from retrikt_ray.runtime.training import Solo
    from retrikt_ray.student.distill import DistillConfig, build, fit, load_rows, load_validation

    torch.set_num_threads(threads)
    task, card = inputs["task"], inputs["task"].read_json("task.json")
    train, validation, test = (task.read_table(f"{s}.parquet").to_pylist() for s in ("train", "validation", "test"))
    truth = np.array([r["value"] for r in train])
    classes = len(card["labels"])
    gold = np.eye(classes, dtype=np.float32)[truth.astype(int)] if classes else truth[:, None].astype(np.float32)
    checking = (texts_of(validation), np.array([r["value"] for r in validation]))

    if name in ("retrikt", "student_kd_store"):
        predictor = Predictor.open(inputs["student"].uri.rsplit("/", 1)[0], threads, edited=False)

        def ask(texts: list[Any]) -> np.ndarray:
            return predictor.predict(texts, evidence=False).answers if name == "retrikt" else predictor.student.encode(texts)[0].numpy()

        system = baselines.System(ask, predictor.student.model.parameter_count)
    elif name == "majority":
        system = baselines.majority(truth, classes)
    elif name == "tfidf_labels":
        system = baselines.tfidf(texts_of(train), gold, not classes, checking, card["metric"])
    else:
        rows = load_rows(inputs["store"])
        if name == "tfidf_store":
            system = baselines.tfidf(rows.texts, rows.teacher.numpy(), not classes, checking, card["metric"])
        else:
            manifest = read_manifest(inputs["student"])
            assert manifest is not None
            config = DistillConfig(**manifest.config)
            student = build(config, inputs["teacher"], rows, card["pair"], seed)
            mine = [i for i, v in enumerate(rows.truth.tolist()) if v == v]  # task rows have a true value
            if name == "student_labels":
                config = config.model_copy(update={"kd": 0.0, "relation": 0.0, "retrieval": 0.0, "labels": 1.0})
            if name.startswith("store:"):
                rng = np.random.default_rng(seed)
                others = [i for i in range(len(rows.texts)) if i not in set(mine)]
                mine += sorted(rng.choice(others, int(len(others) * float(name[6:])), replace=False).tolist())
            chosen = rows.take(mine)
            fit(student, chosen, load_validation(task), config, seed, lambda optimizer, _, total: Solo(optimizer, total))
            system = baselines.System(lambda texts: student.encode(texts)[0].numpy(), student.model.parameter_count)
            if name.startswith("store:"):
                # The run's own mixture over the part of the store: searched exactly, as it is small
                mixture = Mixture(**inputs["index"].read_json("mixture.json"))
                own, words = student.encode(chosen.texts)[1].numpy(), Lexical([Postings.of([chosen.texts], 0)])
                answers, vectors = (x.numpy() for x in student.encode(texts_of(test)))
                dense = Searcher.over(own, 0, threads).search(vectors, mixture.k)
                lexical = words.search(texts_of(test), mixture.lexical_k)
                labels = chosen.teacher.numpy()
                near, alike = (Votes(scores, labels[rows]) for rows, scores in (dense, lexical))
                answers = mix(answers, near, alike, mixture)
                return {"answers": answers, "parameters": system.parameters, "latency_ms": 0.0, "rows": len(mine)}
    texts = texts_of(test)
    return {
        "answers": system.answer(texts),
        "parameters": system.parameters,
        "latency_ms": one_by_one_ms(system.answer, texts, latency_texts),
    }


def examples_of(inputs: dict[str, Folder], count: int, threads: int) -> list[dict[str, Any]]:
    """The first test rows with predictions and nearest neighbours (a Ray task)."""
    import torch

    from retrikt_ray.predictor import Predictor

    torch.set_num_threads(threads)
    predictor = Predictor.open(inputs["student"].uri.rsplit("/", 1)[0], threads, edited=False)
    rows = inputs["task"].read_table("test.parquet").slice(0, count).to_pylist()
    if not rows:
        return []
    found = predictor.predict(texts_of(rows))
    shown = []
    for i, row in enumerate(rows):
        label, score = predictor.named(found.answers[i])
        assert found.dense is not None
        neighbours = predictor.neighbours(found.dense, i, 4, "similarity")
        shown.append({k: row[k] for k in ("text", "text_pair", "label")} | {"predicted": label, "score": score, "neighbours": neighbours})
    return shown


def evaluate(config: EvaluateConfig, inputs: dict[str, Folder], out: dict[str, Folder], *, seed: int) -> dict[str, Any]:
    """Write `report/`: report.json, report.html, predictions.parquet.

    1. The teacher on test (Ray Data).  2. The other systems (Ray tasks).  3. Scores and intervals.  4. Everything else the report shows.  5. Write.
    """
    import pyarrow as pa
    import ray
    import ray.data

    from retrikt_ray.report.page import render
    from retrikt_ray.task.metrics import bootstrap_ci95, paired_ci95, reliability, score

    workers = plan(config, "evaluate")
    task = inputs["task"]
    card = task.read_json("task.json")
    test = task.read_table("test.parquet").to_pylist()
    truth = np.array([r["value"] for r in test])
    metric = card["metric"]

    # 1. the teacher
    rows = [{"row": i, "text": r["text"], "text_pair": r["text_pair"] or ""} for i, r in enumerate(test)]
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // CHUNK)).map_batches(
        TeacherAnswers,
        fn_constructor_args=(inputs["teacher"].uri, workers.threads),
        batch_size=CHUNK,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(workers.count, len(rows) // CHUNK))),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
    )
    answers: dict[str, np.ndarray] = {"teacher": np.zeros((len(rows), len(card["labels"]) or 1))}
    with track("evaluate: teacher", len(rows), "rows") as progress:
        for row in dataset.iter_rows():
            answers["teacher"][int(row["row"])] = row["answer"]
            progress.advance()

    # 2. the other systems; latencies are taken while as many run side by side as there are workers
    names = ["retrikt", "student_kd_store", *(BASELINES if config.baselines else ())]
    parts = [f"store:{f}" for f in config.store_fractions if 0 < f < 1]
    calls = [(n, inputs, seed, workers.threads, config.latency_texts) for n in [*parts, *names]]
    found = dict(zip([*parts, *names], each(fit_and_ask, calls, workers, "evaluate: systems"), strict=True))
    answers |= {n: f["answers"] for n, f in found.items()}
    latency = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(teacher_latency)
    teacher_ms = ray.get(latency.remote(inputs["teacher"], texts_of(test), config.latency_texts, workers.threads))

    # 3. scores
    def scored(name: str) -> dict[str, Any]:
        value = score(metric, truth, answers[name])
        return {"mean": value, "ci95": bootstrap_ci95(metric, truth, answers[name]), "per_seed": [value]}

    teacher = inputs["teacher"].read_json("teacher.json")
    systems = {n: {"score": scored(n), "parameters": found[n]["parameters"], "latency_ms": found[n]["latency_ms"]} for n in names}
    paired = {}
    for name in ["teacher", *names[1:]]:
        difference, half = paired_ci95(metric, truth, answers["retrikt"], answers[name])
        paired[name] = {"difference": difference, "ci95": half}

    # 4. the rest
    store = inputs["store"].read_json("store.json")
    curves = inputs["policy"].read_json("curves.json")
    steps = [p["step"] for p in curves["curve"]]
    watched = {k: [w[k] for w in curves["watch"]] for k in (curves["watch"][0] if curves["watch"] else {}) if k != "step"}
    bins, ece = reliability(truth, answers["retrikt"]) if card["labels"] else ([], None)
    whole = {"rows": store["kept"], "score": systems["retrikt"]["score"]["mean"]}
    manifests = [read_manifest(inputs[n]) for n in ("task", "teacher", "policy", "store", "student", "index")]
    report = {
        "task": card["name"],
        "problem": card["problem"],
        "labels": card["labels"],
        "metric": metric,
        "seeds": [seed],
        "ci95_of": "test rows",
        "rows": {s: task.read_table(f"{s}.parquet", ["id"]).num_rows for s in ("train", "validation", "test", "unlabelled")},
        "teacher": {
            "name": teacher["annotator"],
            "generator": teacher["base"],
            "score": scored("teacher"),
            "parameters": teacher["parameters"],
            "latency_ms": teacher_ms,
        },
        "systems": systems,
        "paired": paired,
        "store": {k: store[k] for k in ("generated", "kept", "rejected", "by_source")},
        "rl": {
            "steps": steps,
            "terms": {k: [p[k] for p in curves["curve"]] for k in (curves["curve"][0] if steps else {}) if k != "step"},
            "watch_steps": [w["step"] for w in curves["watch"]],
            "watch": watched,
            "best_step": curves["best_step"],
            "collapse": curves["collapse"],
        }
        if steps
        else {},
        "store_size": [
            {"rows": found[p]["rows"], "score": score(metric, truth, answers[p])} for p in sorted(parts, key=lambda p: float(p[6:]))
        ]
        + [whole],
        "mixture": inputs["index"].read_json("mixture.json"),
        "reliability": bins,
        "ece": ece,
        "examples": ray.get(ray.remote(num_cpus=workers.cpus)(examples_of).remote(inputs, config.examples, workers.threads)),
        "seconds": {m.stage: m.seconds for m in manifests if m is not None},
    }

    # 5. write
    out["report"].write_json("report.json", report)
    out["report"].write_bytes("report.html", render(report).encode())
    columns = {"id": [r["id"] for r in test], "label": [r["label"] for r in test]}
    columns |= {n: a.tolist() for n, a in answers.items() if not n.startswith("store:")}
    out["report"].write_table("predictions.parquet", pa.table(columns))
    return {
        "retrikt": round(systems["retrikt"]["score"]["mean"], 4),
        "teacher": round(report["teacher"]["score"]["mean"], 4),
        "metric": metric,
    }
