"""RetriKT made anew, in this process, on some rows of a store: for parts of it, and for the benches' other students and other voices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from retrikt_ray.index.learning import of_texts
from retrikt_ray.index.mixture import ALONE, MOST, NAMES, Mixture, Voice, Votes, fit_mixture, mix, voices_of
from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.search import Searcher
from retrikt_ray.index.words.lexical import Lexical
from retrikt_ray.index.words.postings import Postings
from retrikt_ray.report.material import Material, trained
from retrikt_ray.task.metrics import losses, one_hot
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
        from retrikt_ray.student.rows import among, courses, drawn

        positions, sources = np.array(index), material.source[index]
        held = positions[drawn(sources, material.seed)].tolist()
        kept = sorted(set(index) - set(held))
        student, part = trained(material, config, kept, held), material.rows.take(index)
        labels, words = part.teacher.numpy(), Lexical([Postings.of([part.texts], 0)])
        searcher = Searcher.over(student.encode(part.texts)[1].numpy(), 0, material.threads)

        def memory(wanted: np.ndarray) -> Memory:
            rows = material.rows.take(positions[wanted].tolist())
            return of_texts(rows.texts, rows.teacher.numpy())

        seen, masks = np.isin(positions, kept), [among(sources, named) for named in courses(sources)]
        tried = [Unseen.of(material, held, seen, memory(mask & seen)) for mask in masks]
        best = min(range(len(tried)), key=lambda i: tried[i].memory_loss)
        made = Remade(student, searcher, words, memory(masks[best]), labels, tried[best], ALONE)
        return replace(made, mixture=made.fitted())

    @cached_property
    def heard(self) -> tuple[np.ndarray, Votes, Votes, Voice]:
        """What each voice says of the unseen rows: the student's answers, both sides' neighbours, the n-grams' answers."""
        u = self.unseen
        answers, vectors = (x.numpy() for x in self.student.encode(u.texts))
        found = self.searcher.search(vectors, MOST, u.others), self.words.search(u.texts, MOST, u.others)
        return answers, self.votes(found[0]), self.votes(found[1]), u.memory.answers(u.texts)

    def votes(self, found: tuple[np.ndarray, np.ndarray]) -> Votes:
        """Of positions and scores."""
        return Votes(found[1], self.labels[found[0]])

    def fitted(self, names: Sequence[str] = NAMES, rows: int | None = None, prior: bool = True) -> Mixture:
        """The mixture of some of the voices, fitted on the first of the unseen rows; None: on all. prior: whether class frequencies may count."""
        answers, dense, lexical, (said, found) = self.heard
        dense, lexical = (Votes(v.scores[:rows], v.labels[:rows]) for v in (dense, lexical))
        heard = answers[:rows], dense, lexical, (said[:rows], found[:rows])
        return fit_mixture(self.unseen.targets[:rows], *heard, names, self.unseen.gold if prior else 0)

    def answer(self, texts: list[Text], mixture: Mixture | None = None) -> np.ndarray:
        """As `Predictor.answer`: voices without a weight are not asked."""
        m = mixture or self.mixture
        answers, vectors = (x.numpy() for x in self.student.encode(texts))
        dense = self.votes(self.searcher.search(vectors, m.k)) if m.dense else None
        lexical = self.votes(self.words.search(texts, m.lexical_k)) if m.lexical else None
        return mix(answers, voices_of(dense, lexical, self.memory.answers(texts) if m.ngrams else None, m), m)


@dataclass(frozen=True)
class Unseen:
    """Rows that the voices are fitted on, validation first, and what speaks without having seen them."""

    texts: list[Text]
    targets: np.ndarray  # (Q, C)
    gold: int  # how many of them are validation's
    others: np.ndarray  # (n,) bool: rows that may be their neighbours
    memory: Memory

    @property
    def memory_loss(self) -> float:
        """What the memory's answers alone lose."""
        return float(losses(self.memory.answers(self.texts)[0], self.targets).mean())

    @staticmethod
    def of(material: Material, held: list[int], others: np.ndarray, memory: Memory) -> Unseen:
        (texts, truth), rows = material.split("validation"), material.rows.take(held)
        targets = np.concatenate([one_hot(truth, rows.teacher.shape[1]), rows.teacher.numpy()])
        return Unseen(texts + rows.texts, targets, len(texts), others, memory)
