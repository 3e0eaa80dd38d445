"""What the systems of a report are fitted to, read when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import Text, texts_of

if TYPE_CHECKING:
    from collections import Counter

    from retrikt_ray.predictor import Predictor
    from retrikt_ray.student.fit import DistillConfig
    from retrikt_ray.student.model import Student
    from retrikt_ray.student.rows import Rows


@dataclass(frozen=True)
class Material:
    """What systems are fitted to, read when it is asked for. Travels to Ray tasks."""

    inputs: dict[str, Folder]  # task, teacher, store, student, index
    seed: int
    threads: int
    sources: tuple[str, ...] = ()  # of the store's rows; none: all
    config: DistillConfig | None = None  # of students; None: the one that the run's student was trained with

    @cached_property
    def task(self) -> Task:
        return Task.read(self.inputs["task"])

    def split(self, name: str) -> tuple[list[Text], np.ndarray]:
        """Texts of a split, and their true class ids or values (N,)."""
        table = self.inputs["task"].read_table(f"{name}.parquet")
        return texts_of(table), np.array(table["value"].to_pylist())

    @cached_property
    def every_source(self) -> np.ndarray:
        """Of each row of the store."""
        from retrikt_ray.student.rows import sources_of

        return sources_of(self.inputs["store"])

    @cached_property
    def source(self) -> np.ndarray:
        """Of each row of `rows`, (N,)."""
        return self.every_source[self.wanted]

    @cached_property
    def rows(self) -> Rows:
        """The store's, of these sources."""
        from retrikt_ray.student.rows import load_rows

        return load_rows(self.inputs["store"]).take(self.wanted.nonzero()[0].tolist())

    @property
    def wanted(self) -> np.ndarray:
        """Whether a row of the store is of these sources, bool."""
        return np.isin(self.every_source, self.sources or np.unique(self.every_source))

    @cached_property
    def labelled(self) -> list[int]:
        """The store's rows with a true label: the task's."""
        return [i for i, value in enumerate(self.rows.truth.tolist()) if value == value]

    @cached_property
    def token_counts(self) -> Counter[int]:
        """How often each of the teacher's tokens occurs in the store."""
        from retrikt_ray.student.inherit import count_tokens
        from retrikt_ray.teacher.annotator import tokenizer_of

        return count_tokens(tokenizer_of(self.inputs["teacher"]), [self.rows.texts])

    @cached_property
    def distill(self) -> DistillConfig:
        """The config of students."""
        from retrikt_ray.student.fit import DistillConfig

        return self.config or DistillConfig(**check(self.inputs["student"], only=[]).config)

    @cached_property
    def predictor(self) -> Predictor:
        """The run's student and knowledge, as the stages made them: a report does not look at edits."""
        from retrikt_ray.knowledge.base import Places
        from retrikt_ray.predictor import Predictor

        return Predictor.at(Places(*(self.inputs[name] for name in ("task", "student", "store", "index"))), self.threads)


def trained(material: Material, config: DistillConfig, index: list[int], held: list[int] | None = None) -> Student:
    """A student of the run's own kind and size, trained in this process on some of the store's rows.

    held: rows of the store that, beside validation, choose its weights, and whether it learns from all the others (`courses`).
    """
    from retrikt_ray.runtime.training import Solo
    from retrikt_ray.student.fit import fit, unseen_loss, untrained
    from retrikt_ray.student.rows import among, balanced, courses, joined_rows, load_validation

    every, positions, found = material.rows, np.array(index), []
    unseen = joined_rows([load_validation(material.inputs["task"], every.teacher.shape[1]), every.take(held or [])])
    for sources in courses(material.source[index + (held or [])]):
        wanted = positions[among(material.source[positions], sources)]
        rows = every.take(balanced(wanted, material.source).tolist())
        student = untrained(config, material.inputs["teacher"], material.token_counts, material.task.pair, material.seed)
        fit(student, rows, unseen, config, material.seed, lambda o, _, total: Solo(o, total, material.seed))
        found.append((unseen_loss(student, unseen), student))
    return min(found, key=lambda pair: pair[0])[1]
