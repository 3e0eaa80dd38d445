"""What a bench compares, in groups that share what they train. Each group is a function of what a run left and gives systems by name.

`retrikt`, `student_*`, `tfidf_*` and `majority` are those of a run's report; the others:

  ensemble       mean of `student_kd_store` and `tfidf_store`: the best of two cheap things
  tfidf_small    TF-IDF on the store with as many numbers as the student has parameters
  static_lr      like model2vec: averages of the teacher's token vectors (256 dimensions), logistic regression on the store
  setfit         like SetFit: the teacher's own embeddings, logistic regression on the store; not tiny, an upper reference
  no_*           RetriKT without one of its voices; `no_prior`: without the class frequencies of validation
  gold_fit       the mixture fitted on the validation rows alone
  loss_*         RetriKT whose student is trained without one of its losses
  kind_static    RetriKT with a student that sees no word order
  size_*         RetriKT with a student of another size (percent of the teacher)
  store_*        RetriKT on a part of the store (percent of the rows that are not the task's)
  model          RetriKT whose student is the pre-trained encoder that the annotator began as, whatever its size: what being tiny costs.
                 Hours on a CPU, so only where a bench's `groups` names it
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from retrikt_ray.index.mixture import ALONE, NAMES
from retrikt_ray.report import systems
from retrikt_ray.report.baselines import System, linear, tfidf
from retrikt_ray.report.material import Material
from retrikt_ray.report.remade import Remade
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.task.texts import Text

Systems = dict[str, System]


def teacher(material: Material) -> Systems:
    from retrikt_ray.teacher.annotator import Annotator

    annotator, rows = Annotator.load(material.inputs["teacher"]), material.rows
    known: dict[tuple[Text, ...], tuple[np.ndarray, np.ndarray]] = {}

    def asked(texts: list[Text]) -> tuple[np.ndarray, np.ndarray]:
        if tuple(texts) not in known:
            answers, embeddings = annotator.annotate(texts)
            known[tuple(texts)] = answers.numpy(), embeddings.numpy()
        return known[tuple(texts)]

    assert rows.embeddings is not None
    scale = float(rows.embeddings.norm(dim=1).mean())
    setfit = linear(
        rows.embeddings.numpy() / scale,
        rows.teacher.numpy(),
        lambda texts: asked(texts)[1] / scale,
        material.split("validation"),
        material.task.metric,
    )
    size = annotator.parameter_count
    return {"teacher": System(lambda texts: asked(texts)[0], size), "setfit": System(setfit.answer, size + setfit.parameters)}


def whole(material: Material) -> Systems:
    """RetriKT, its voices, and what could be done with the same store instead."""
    made = Remade.of(material, material.distill, list(range(len(material.rows))))
    size, words = made.student.model.parameter_count, systems.tfidf_store(material)
    mixtures = {"retrikt": made.mixture, "student_kd_store": ALONE}
    mixtures |= {f"no_{name}": made.fitted([n for n in NAMES if n != name]) for name in NAMES}
    mixtures["no_prior"] = made.fitted(prior=False)
    mixtures["gold_fit"] = made.fitted(rows=len(material.split("validation")[0]))
    found = {name: System(partial(made.answer, mixture=m), size) for name, m in mixtures.items()} | {"tfidf_store": words}
    student = found["student_kd_store"].answer
    return found | {"ensemble": System(lambda texts: (student(texts) + words.answer(texts)) / 2, size + words.parameters)}


def labels(material: Material) -> Systems:
    """What can be done with the labelled rows alone."""
    return {s: systems.BY_NAME[s].fit(material) for s in ("student_kd_labels", "student_labels", "tfidf_labels", "majority")}


def small(material: Material) -> Systems:
    """Cheaper ways to spend the same store."""
    from retrikt_ray.student.fit import untrained

    rows, validation, metric = material.rows, material.split("validation"), material.task.metric
    size = int(material.distill.size * material.inputs["teacher"].read_json("teacher.json")["parameters"])
    words = tfidf(rows.texts, rows.teacher.numpy(), validation, metric, size)
    wide = material.distill.model_copy(update={"kind": "static", "size": 1.0})
    averages = untrained(wide, material.inputs["teacher"], material.token_counts, material.task.pair, material.seed)

    def features(texts: list[Text]) -> np.ndarray:
        return np.asarray(averages.encode(texts)[1].numpy() * 4)

    static = linear(features(rows.texts), rows.teacher.numpy(), features, validation, metric)
    return {"tfidf_small": words, "static_lr": System(static.answer, averages.model.parameter_count + static.parameters)}


def other(name: str, change: dict[str, Any], material: Material) -> Systems:
    """RetriKT whose student is trained otherwise."""
    made = Remade.of(material, material.distill.model_copy(update=change), list(range(len(material.rows))))
    return {name: System(made.answer, made.student.model.parameter_count)}


def model(material: Material) -> Systems:
    encoder = (material.inputs["teacher"] / "classifier").read_json("classifier.json")["kind"]
    if encoder in ("prompt", "base"):
        raise ConfigError(f"groups: `model` needs a pre-trained encoder as teach.annotator; found {encoder!r}")
    return other("model", {"model": encoder, "epochs": 3}, material)


def part(name: str, fraction: float, material: Material) -> Systems:
    return {name: systems.part_of_store(material, fraction)[0]}


GROUPS: dict[str, Callable[[Material], Systems]] = {
    "teacher": teacher,
    "retrikt": whole,
    "labels": labels,
    "small": small,
    "loss_relation": partial(other, "loss_relation", {"relation": 0.0}),
    "loss_retrieval": partial(other, "loss_retrieval", {"retrieval": 0.0}),
    "kind_static": partial(other, "kind_static", {"kind": "static"}),
    "size_0.3": partial(other, "size_0.3", {"size": 0.003}),
    "size_2": partial(other, "size_2", {"size": 0.02}),
    "size_4": partial(other, "size_4", {"size": 0.04}),
    "store_10": partial(part, "store_10", 0.1),
    "store_30": partial(part, "store_30", 0.3),
    "model": model,
}
SLOW = {"model"}
