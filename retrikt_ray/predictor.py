"""Prediction with evidence: the student's own answer mixed with the votes of the rows it retrieves.

p = (1 - d - l) p_student + d p_dense + l p_lexical, where p_dense is the mean of the nearest rows' teacher labels, weighted by softmax of
similarity / tau over k, and p_lexical the same over the rows with the highest BM25 scores. Weights, k and tau are fitted on validation by
the index stage. In regression the same mixture is of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from retrikt_ray.knowledge.knowledge import Hits, Knowledge
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import ArtifactError, Folder

if TYPE_CHECKING:
    from retrikt_ray.index.search import Search
    from retrikt_ray.student.model import Student
    from retrikt_ray.teacher.annotator import Text


@dataclass(frozen=True)
class Mixture:
    """How much the student and its neighbours count, and how neighbours vote."""

    student: float
    dense: float
    lexical: float
    k: int
    tau: float
    lexical_k: int
    lexical_tau: float  # in units of BM25 scores


KS, MOST = (8, 16, 32, 64), 64
TAUS, LEXICAL_TAUS = (0.02, 0.05, 0.1), (0.5, 1.0, 2.0, 4.0)
TENTHS = [i / 10 for i in range(10)]
ALONE = Mixture(1.0, 0.0, 0.0, 8, 0.05, 8, 1.0)


@dataclass(frozen=True)
class Votes:
    """Neighbours of Q queries."""

    scores: np.ndarray  # (Q, k) similarities or BM25 scores, best first, -inf where there is none
    labels: np.ndarray  # (Q, k, C)


def vote(scores: np.ndarray, labels: np.ndarray, tau: float) -> np.ndarray:
    """Mean of the neighbours' labels, weighted by softmax of score / tau. scores (Q, k), -inf where there is none; labels (Q, k, C) -> (Q, C)"""
    best = scores.max(1, keepdims=True)
    weights = np.exp((scores - np.where(np.isfinite(best), best, 0)) / tau)
    weights /= weights.sum(1, keepdims=True).clip(1e-12)  # a query that found nothing gets no vote
    return np.einsum("qk,qkc->qc", weights, labels)


def cast(votes: Votes, k: int, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """The vote of the first k neighbours (Q, C), and 1 for a query that has any, else 0, (Q, 1)."""
    k = min(k, votes.scores.shape[1])
    return vote(votes.scores[:, :k], votes.labels[:, :k], tau), np.isfinite(votes.scores[:, :1]).astype(np.float64)


def mix(student: np.ndarray, dense: Votes | None, lexical: Votes | None, mixture: Mixture) -> np.ndarray:
    """(Q, C) answers of student and neighbours together; where one side found nothing, its weight is the student's. None: weight 0."""
    answers, left = np.zeros_like(student, dtype=np.float64), np.ones((len(student), 1))
    sides = ((dense, mixture.dense, mixture.k, mixture.tau), (lexical, mixture.lexical, mixture.lexical_k, mixture.lexical_tau))
    for votes, weight, k, tau in sides:
        if weight and votes is not None:
            told, there = cast(votes, k, tau)
            answers += weight * there * told
            left -= weight * there
    return answers + left * student


def loss(truth: np.ndarray, answers: np.ndarray) -> float:
    """Mean negative log-likelihood of the true class, or mean squared error in regression: smoother than accuracy on few rows."""
    if answers.shape[1] == 1:
        return float(((answers[:, 0] - truth) ** 2).mean())
    return float(-np.log(np.clip(answers[np.arange(len(truth)), truth.astype(int)], 1e-6, 1)).mean())


def fit_mixture(truth: np.ndarray, student: np.ndarray, dense: Votes, lexical: Votes) -> Mixture:
    """The mixture with the smallest validation loss; the student alone where no mixture beats it.

    k and tau of each side are chosen with the student alone beside it, then the weights of both together: few choices for few rows.
    """

    def best(some: list[Mixture]) -> Mixture:
        return min(some, key=lambda m: loss(truth, mix(student, dense, lexical, m)))

    weights = TENTHS[1:]
    d = best([replace(ALONE, student=round(1 - w, 1), dense=w, k=k, tau=tau) for k in KS for tau in TAUS for w in weights])
    words = [(k, tau, w) for k in KS for tau in LEXICAL_TAUS for w in weights]
    s = best([replace(ALONE, student=round(1 - w, 1), lexical=w, lexical_k=k, lexical_tau=tau) for k, tau, w in words])
    pairs = [(a, b) for a in TENTHS for b in TENTHS if a + b < 0.95]
    both = [Mixture(round(1 - a - b, 1), a, b, d.k, d.tau, s.lexical_k, s.lexical_tau) for a, b in pairs]
    return best([ALONE, *both])


def votes_of(hits: Hits | None) -> Votes | None:
    return None if hits is None else Votes(hits.scores, hits.labels)


@dataclass
class Prediction:
    """Answers for Q texts and their evidence."""

    answers: np.ndarray  # (Q, C) mixed probabilities, or (Q, 1) values
    student: np.ndarray  # (Q, C) the student's own
    dense: Hits | None  # the nearest rows; None where they were not asked for
    lexical: Hits | None  # the rows that share most words

    def part(self, low: int, high: int) -> Prediction:
        """Of the texts low .. high - 1."""
        return Prediction(self.answers[low:high], self.student[low:high], *(h and h.part(low, high) for h in (self.dense, self.lexical)))


class Predictor:
    """Student and knowledge of a run, opened for answering."""

    def __init__(self, student: Student, knowledge: Knowledge, mixture: Mixture) -> None:
        self.student, self.knowledge, self.mixture = student, knowledge, mixture
        self.task = knowledge.task

    @staticmethod
    def open(
        run: str | Folder, threads: int = 1, *, edited: bool = True, opener: Callable[[Folder, int], Search] | None = None
    ) -> Predictor:
        """Open RUN's task card, student and knowledge after comparing each with its manifest. edited, opener: as for Knowledge.

        Raises ArtifactError that names the file that is missing, altered, or does not belong to the others.
        """
        from retrikt_ray.student.model import Student

        folder = Folder.at(run) if isinstance(run, str) else run
        knowledge = Knowledge(folder, threads, edited=edited, opener=opener)
        index = folder / "index"
        if check(index, deep=True, only=["mixture.json"]).inputs["student"] != knowledge.student:
            raise ArtifactError(f"{index}/mixture.json was fitted for another student; run `retrikt index {folder}`")
        try:
            mixture = Mixture(**index.read_json("mixture.json"))
        except TypeError as error:
            raise ArtifactError(f"{index}/mixture.json is not of this version ({error}); run `retrikt index {folder}`") from None
        return Predictor(Student.load(str((folder / "student").local())), knowledge, mixture)

    def predict(self, texts: Sequence[Text], evidence: bool = True) -> Prediction:
        """Answer Q texts, each a (text, second text or None). evidence=False: sides without a vote are not searched."""
        answers, vectors = (x.numpy() for x in self.student.encode(list(texts)))
        m, dense, lexical = self.mixture, None, None
        if m.dense or evidence:
            dense = self.knowledge.search(vectors, m.k)
        if m.lexical or evidence:
            lexical = self.knowledge.search_words(list(texts), m.lexical_k)
        return Prediction(mix(answers, votes_of(dense), votes_of(lexical), m), answers, dense, lexical)

    def retrieve(self, texts: Sequence[Text], k: int, **where: str | None) -> Hits:
        """The k nearest rows of each text; label=, source=: only such rows."""
        return self.knowledge.search(self.student.encode(list(texts))[1].numpy(), k, **where)

    def row(self, position: int) -> dict[str, Any]:
        """One row of the store: id, text, text_pair, source, asked_label, and the teacher's label and its score."""
        row = self.knowledge.row(position)
        label, score = self.named(np.asarray(row.pop("teacher_probs")))
        return row | {"label": label, "score": score}

    def neighbours(self, hits: Hits, query: int, most: int, score: str) -> list[dict[str, Any]]:
        """Up to `most` rows that a query found, best first; `score` names the key of their similarity or BM25 score."""
        found = zip(hits.positions[query][:most], hits.scores[query], strict=False)
        return [self.row(int(p)) | {score: float(s)} for p, s in found if p >= 0]

    def named(self, answer: np.ndarray) -> tuple[str, float]:
        """The label of an answer (C,) and its probability; in regression the value as text and as number."""
        if len(answer) == 1:
            return f"{answer[0]:.3g}", float(answer[0])
        best = int(answer.argmax())
        return self.task["labels"][best], float(answer[best])

    def info(self) -> dict[str, Any]:
        """What is served: task, labels, sizes, mixture, index."""
        knowledge = self.knowledge
        state = knowledge.state
        return {
            "task": self.task["name"],
            "problem": self.task["problem"],
            "labels": self.task["labels"],
            "pair": self.task["pair"],
            "student": {"kind": self.student.model.config.kind, "parameters": self.student.model.parameter_count},
            "store": {"rows": knowledge.count, "version": state.version if state else 0},
            "index": {"factory": knowledge.card["factory"], "shards": len(knowledge.card["shards"]), "width": knowledge.card["width"]},
            "mixture": asdict(self.mixture),
        }
