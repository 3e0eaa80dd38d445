"""RetriKT made anew, in this process, on some rows of a store: for parts of it, and for the benches' other students and other voices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from retrikt_ray.index.learning import of_texts
from retrikt_ray.index.lexical import Lexical, Postings
from retrikt_ray.index.mixture import ALONE, MOST, NAMES, Mixture, Voice, Votes, fit_mixture, mix, voices_of
from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.search import Searcher
from retrikt_ray.report.material import Material, trained
from retrikt_ray.task.metrics import one_hot
from retrikt_ray.task.texts import Text

if TYPE_CHECKING:
    from retrikt_ray.student.fit import DistillConfig
    from retrikt_ray.student.model import Student


@dataclass(frozen=True)
class Remade:
    """RetriKT made in this process on some rows of a store, as the stages make it on all of them. Neighbours are searched exactly."""

    student: Student
    searcher: Searcher
    words: Lexical
    memory: Memory
    labels: np.ndarray  # (n, C) the teacher's, of these rows
    unseen: Unseen
    mixture: Mixture

    @staticmethod
    def of(material: Material, config: DistillConfig, index: list[int]) -> Remade:
        """index: positions of the rows in the store."""
        from retrikt_ray.student.rows import drawn

        held = np.array(index)[drawn(material.source[index], material.seed)].tolist()
        kept = sorted(set(index) - set(held))
        student, part = trained(material, config, kept, held), material.rows.take(index)
        labels, words = part.teacher.numpy(), Lexical([Postings.of([part.texts], 0)])
        searcher = Searcher.over(student.encode(part.texts)[1].numpy(), 0, material.threads)
        rest = material.rows.take(kept)
        unseen = Unseen.of(material, held, np.isin(index, kept), of_texts(rest.texts, rest.teacher.numpy()))
        made = Remade(student, searcher, words, of_texts(part.texts, labels), labels, unseen, ALONE)
        return replace(made, mixture=made.fitted())

    def heard(self, texts: list[Text], memory: Memory, allowed: np.ndarray | None = None) -> tuple[np.ndarray, Votes, Votes, Voice]:
        """What each voice says: the student's answers, both sides' neighbours, the n-grams' answers."""
        answers, vectors = (x.numpy() for x in self.student.encode(texts))
        found = (self.searcher.search(vectors, MOST, allowed), self.words.search(texts, MOST, allowed))
        dense, lexical = (Votes(scores, self.labels[positions]) for positions, scores in found)
        return answers, dense, lexical, memory.answers(texts)

    def fitted(self, names: tuple[str, ...] = NAMES) -> Mixture:
        """The mixture of some of the voices."""
        u = self.unseen
        return fit_mixture(u.targets, *self.heard(u.texts, u.memory, u.others), names)

    def answer(self, texts: list[Text], mixture: Mixture | None = None) -> np.ndarray:
        m = mixture or self.mixture
        answers, dense, lexical, ngrams = self.heard(texts, self.memory)
        return mix(answers, voices_of(dense, lexical, ngrams, m), m)


@dataclass(frozen=True)
class Unseen:
    """Rows that the voices are fitted on, and what speaks without having seen them."""

    texts: list[Text]
    targets: np.ndarray  # (Q, C)
    others: np.ndarray  # (n,) bool: rows that may be their neighbours
    memory: Memory

    @staticmethod
    def of(material: Material, held: list[int], others: np.ndarray, memory: Memory) -> Unseen:
        (texts, truth), rows = material.split("validation"), material.rows.take(held)
        targets = np.concatenate([one_hot(truth, rows.teacher.shape[1]), rows.teacher.numpy()])
        return Unseen(texts + rows.texts, targets, others, memory)
