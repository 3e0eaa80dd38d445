"""The systems that a report compares: one table of what each is called and how it is fitted, read by evaluate, the report's page and the benches.

A new system is a function here (or in `baselines.py`) and a line of SYSTEMS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrikt_ray.report import baselines
from retrikt_ray.report.baselines import System
from retrikt_ray.report.material import Material, trained
from retrikt_ray.report.remade import Remade
from retrikt_ray.task.metrics import one_hot, score

if TYPE_CHECKING:
    from retrikt_ray.student.model import Student


def retrikt(material: Material) -> System:
    predictor = material.predictor
    return System(lambda texts: predictor.answer(texts, evidence=False).answers, predictor.student.model.parameter_count)


def student_kd_store(material: Material) -> System:
    return of_student(material.predictor.student)


def student_kd_labels(material: Material) -> System:
    return of_student(trained(material, material.distill, material.labelled))


def student_labels(material: Material) -> System:
    plain = material.distill.model_copy(update={"kd": 0.0, "relation": 0.0, "retrieval": 0.0, "labels": 1.0})
    return of_student(trained(material, plain, material.labelled))


def tfidf_store(material: Material) -> System:
    """Of all rows or, as RetriKT's voices may, of the domain's own alone: what answers more of validation."""
    from retrikt_ray.student.rows import among, courses

    (texts, truth), found = material.split("validation"), []
    for named in courses(material.source):
        rows = material.rows.take(np.flatnonzero(among(material.source, named)).tolist())
        system = baselines.tfidf(rows.texts, rows.teacher.numpy(), (texts, truth), material.task.metric)
        found.append((score(material.task.metric, truth, system.answer(texts)), system))
    return max(found, key=lambda pair: pair[0])[1]


def tfidf_labels(material: Material) -> System:
    (texts, truth), task = material.split("train"), material.task
    return baselines.tfidf(texts, one_hot(truth, task.outputs), material.split("validation"), task.metric)


def majority(material: Material) -> System:
    """Of labelled and validation rows: the former may be as many of each class, by `prepare.n_per_class`."""
    truth = np.concatenate([material.split(name)[1] for name in ("train", "validation")])
    return baselines.majority(truth, len(material.task.labels))


def of_student(student: Student) -> System:
    return System(lambda texts: student.encode(texts)[0].numpy(), student.model.parameter_count)


def part_of_store(material: Material, fraction: float) -> tuple[System, int]:
    """RetriKT made anew on a part of the store, beside all of the task's rows; and the rows it had."""
    own = set(material.labelled)
    others = [i for i in range(len(material.rows.texts)) if i not in own]
    drawn = np.random.default_rng(material.seed).choice(others, int(len(others) * fraction), replace=False)
    index = material.labelled + sorted(drawn.tolist())
    made = Remade.of(material, material.distill, index)
    return System(made.answer, made.student.model.parameter_count), len(index)


@dataclass(frozen=True)
class Contender:
    """One line of the comparison."""

    name: str  # in report.json
    title: str  # on the page
    description: str
    fit: Callable[[Material], System]
    baseline: bool = True  # left out with `evaluate.baselines: false`


SYSTEMS = (
    Contender("retrikt", "RetriKT", "tiny student with retrieval from the teacher-labelled store", retrikt, baseline=False),
    Contender(
        "student_kd_store",
        "Student, KD on store",
        "the same student distilled on the store, without retrieval",
        student_kd_store,
        baseline=False,
    ),
    Contender(
        "student_kd_labels", "Student, KD on labels", "distilled on the labelled rows: no generated texts, no retrieval", student_kd_labels
    ),
    Contender("student_labels", "Student, labels only", "trained on the labelled rows: no teacher either", student_labels),
    Contender("tfidf_store", "TF-IDF on store", "linear model of words, taught by the teacher's labels of the store", tfidf_store),
    Contender("tfidf_labels", "TF-IDF on labels", "linear model of words, taught by the labelled rows", tfidf_labels),
    Contender("majority", "Majority", "one answer for every text: the commonest label, or the mean", majority),
)
BY_NAME: dict[str, Contender] = {system.name: system for system in SYSTEMS}
