"""The systems that a report compares: one table of what each is called and how it is fitted, read by evaluate, the report's page and the benches.

A new system is a function here (or in `baselines.py`) and a line of SYSTEMS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from retrikt_ray.report import baselines
from retrikt_ray.report.baselines import System
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import Text, texts_of

if TYPE_CHECKING:
    from retrikt_ray.predictor import Predictor
    from retrikt_ray.student.fit import DistillConfig, Rows
    from retrikt_ray.student.model import Student


@dataclass(frozen=True)
class Material:
    """What systems are fitted to, read when it is asked for. Travels to Ray tasks."""

    inputs: dict[str, Folder]  # task, teacher, store, student, index
    seed: int
    threads: int

    @cached_property
    def task(self) -> Task:
        return Task.read(self.inputs["task"])

    def split(self, name: str) -> tuple[list[Text], np.ndarray]:
        """Texts of a split, and their true class ids or values (N,)."""
        table = self.inputs["task"].read_table(f"{name}.parquet")
        return texts_of(table), np.array(table["value"].to_pylist())

    @cached_property
    def rows(self) -> Rows:
        """The store's."""
        from retrikt_ray.student.fit import load_rows

        return load_rows(self.inputs["store"])

    @cached_property
    def labelled(self) -> list[int]:
        """The store's rows with a true label: the task's."""
        return [i for i, value in enumerate(self.rows.truth.tolist()) if value == value]

    @cached_property
    def distill(self) -> DistillConfig:
        """The config that the student was trained with."""
        from retrikt_ray.student.fit import DistillConfig

        return DistillConfig(**check(self.inputs["student"], only=[]).config)

    @cached_property
    def predictor(self) -> Predictor:
        """The run's student and knowledge, as the stages made them: a report does not look at edits."""
        from retrikt_ray.knowledge.view import Places
        from retrikt_ray.predictor import Predictor

        return Predictor.at(Places(*(self.inputs[name] for name in ("task", "student", "store", "index"))), self.threads)


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
    rows, task = material.rows, material.task
    return baselines.tfidf(rows.texts, rows.teacher.numpy(), task.regression, material.split("validation"), task.metric)


def tfidf_labels(material: Material) -> System:
    (texts, truth), task = material.split("train"), material.task
    gold = truth[:, None].astype(np.float32) if task.regression else np.eye(task.outputs, dtype=np.float32)[truth.astype(int)]
    return baselines.tfidf(texts, gold, task.regression, material.split("validation"), task.metric)


def majority(material: Material) -> System:
    return baselines.majority(material.split("train")[1], len(material.task.labels))


def of_student(student: Student) -> System:
    return System(lambda texts: student.encode(texts)[0].numpy(), student.model.parameter_count)


def trained(material: Material, config: DistillConfig, index: list[int]) -> Student:
    """A student of the run's own kind and size, trained in this process on some of the store's rows."""
    from retrikt_ray.runtime.training import Solo
    from retrikt_ray.student.fit import fit, load_validation, untrained

    student = untrained(material.distill, material.inputs["teacher"], material.rows, material.task.pair, material.seed)
    validation = load_validation(material.inputs["task"])
    fit(student, material.rows.take(index), validation, config, material.seed, lambda o, _, total: Solo(o, total, material.seed))
    return student


def part_of_store(material: Material, fraction: float) -> tuple[System, int]:
    """RetriKT on a part of the store, beside all of the task's rows: a student of its own, the run's own mixture; and the rows it had.

    The part is searched exactly, as it is small.
    """
    from retrikt_ray.index.lexical import Lexical, Postings
    from retrikt_ray.index.mixture import Mixture, Votes, mix
    from retrikt_ray.index.search import Searcher

    own = set(material.labelled)
    others = [i for i in range(len(material.rows.texts)) if i not in own]
    drawn = np.random.default_rng(material.seed).choice(others, int(len(others) * fraction), replace=False)
    index = material.labelled + sorted(drawn.tolist())
    student, part = trained(material, material.distill, index), material.rows.take(index)
    mixture = Mixture(**material.inputs["index"].read_json("mixture.json"))
    labels, words = part.teacher.numpy(), Lexical([Postings.of([part.texts], 0)])
    searcher = Searcher.over(student.encode(part.texts)[1].numpy(), 0, material.threads)

    def answer(texts: list[Text]) -> np.ndarray:
        answers, vectors = (x.numpy() for x in student.encode(texts))
        found = (searcher.search(vectors, mixture.k), words.search(texts, mixture.lexical_k))
        dense, lexical = (Votes(scores, labels[positions]) for positions, scores in found)
        return mix(answers, dense, lexical, mixture)

    return System(answer, student.model.parameter_count), len(index)


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
