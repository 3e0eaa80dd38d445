"""Prediction with evidence: the student's own answer mixed with the vote of the rows it retrieves.

p = w p_student + (1 - w) p_neighbours, where p_neighbours is the similarity-weighted mean of the neighbours' teacher labels
(softmax of similarity / tau over k). The weight, k and tau are fitted on validation by the index stage. In regression the same mixture
is of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from retrikt_ray.artifacts import check
from retrikt_ray.folders import ArtifactError, Folder
from retrikt_ray.search import Searcher

if TYPE_CHECKING:
    from retrikt_ray.classifier import Text
    from retrikt_ray.student import Student


@dataclass(frozen=True)
class Mixture:
    """How much the student and its neighbours count, and how neighbours vote."""

    student: float
    dense: float
    k: int
    tau: float


GRID = [
    Mixture(w, round(1 - w, 1), k, tau)
    for k in (8, 16, 32, 64)
    for tau in (0.02, 0.05, 0.1)
    for w in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
]


def vote(similarities: np.ndarray, labels: np.ndarray, tau: float) -> np.ndarray:
    """Similarity-weighted mean of the neighbours' labels. similarities (Q, k), -inf where there is none; labels (Q, k, C) -> (Q, C)"""
    best = similarities.max(1, keepdims=True)
    weights = np.exp((similarities - np.where(np.isfinite(best), best, 0)) / tau)
    weights /= weights.sum(1, keepdims=True).clip(1e-12)  # a query whose lists are all empty gets no vote
    return np.einsum("qk,qkc->qc", weights, labels)


def mix(student: np.ndarray, similarities: np.ndarray, labels: np.ndarray, mixture: Mixture) -> np.ndarray:
    """(Q, C) answers of student and its k neighbours together."""
    k = min(mixture.k, similarities.shape[1])
    weight = mixture.dense * np.isfinite(similarities[:, :1])  # 0 for a query that found no neighbour
    return (1 - weight) * student + weight * vote(similarities[:, :k], labels[:, :k], mixture.tau)


def loss(truth: np.ndarray, answers: np.ndarray) -> float:
    """Mean negative log-likelihood of the true class, or mean squared error in regression: smoother than accuracy on few rows."""
    if answers.shape[1] == 1:
        return float(((answers[:, 0] - truth) ** 2).mean())
    return float(-np.log(np.clip(answers[np.arange(len(truth)), truth.astype(int)], 1e-6, 1)).mean())


def fit_mixture(truth: np.ndarray, student: np.ndarray, similarities: np.ndarray, labels: np.ndarray) -> Mixture:
    """The mixture of the grid with the smallest validation loss; the student alone where no mixture beats it."""
    alone = Mixture(1.0, 0.0, 8, 0.05)
    return min([alone, *GRID], key=lambda m: loss(truth, mix(student, similarities, labels, m)))


@dataclass
class Prediction:
    """Answers for Q texts and their evidence."""

    answers: np.ndarray  # (Q, C) mixed probabilities, or (Q, 1) values
    student: np.ndarray  # (Q, C) the student's own
    positions: np.ndarray  # (Q, k) neighbours in the store, -1 where there is none
    similarities: np.ndarray  # (Q, k) cosine


class Predictor:
    """Student, index and store of a run, opened for answering."""

    def __init__(self, student: Student, searcher: Searcher, store: Any, task: dict[str, Any], mixture: Mixture) -> None:
        self.student, self.searcher, self.task, self.mixture = student, searcher, task, mixture
        self.store = store  # pyarrow table of the rows in the order of positions
        self.labels = np.array(store["teacher_probs"].to_pylist(), dtype=np.float32)  # (N, C)

    @staticmethod
    def open(run: str | Folder, threads: int = 1) -> Predictor:
        """Open RUN's task card, student, index and store after comparing each with its manifest.

        Raises ArtifactError that names the file that is missing, altered, or does not belong to the others.
        """
        from retrikt_ray.student import Student

        folder = Folder.at(run) if isinstance(run, str) else run
        if not folder.exists("config.yaml"):
            raise ArtifactError(f"{folder} is not a run directory: it has no config.yaml")
        # The index is compared by SHA-256 when it is opened, below.
        seals = {name: check(folder / name, deep=name != "index") for name in ("task", "student", "store", "index")}
        for name in ("student", "store"):
            if seals["index"].inputs[name] != seals[name].content:
                raise ArtifactError(f"{folder}/index was built from another {name}; run `retrikt index {folder}`")
        columns = ["id", "text", "text_pair", "source", "asked_label", "teacher_probs"]
        mixture = Mixture(**(folder / "index").read_json("mixture.json"))
        searcher = Searcher.open(folder / "index", threads)
        store = (folder / "store").read_tables(columns=columns)
        if searcher.rows != store.num_rows:
            raise ArtifactError(f"{folder}/index holds {searcher.rows} rows, {folder}/store {store.num_rows}")
        return Predictor(
            Student.load(str((folder / "student").local())), searcher, store, (folder / "task").read_json("task.json"), mixture
        )

    def retrieve(self, texts: Sequence[Text], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The student's answers (Q, C), and the k nearest rows: positions (Q, k) and similarities (Q, k)."""
        answers, vectors = self.student.encode(list(texts))
        positions, similarities = self.searcher.search(vectors.numpy(), k)
        return answers.numpy(), positions, similarities

    def predict(self, texts: Sequence[Text]) -> Prediction:
        """Answer Q texts, each a (text, second text or None)."""
        student, positions, similarities = self.retrieve(texts, self.mixture.k)
        return Prediction(mix(student, similarities, self.labels[positions], self.mixture), student, positions, similarities)

    def row(self, position: int) -> dict[str, Any]:
        """One row of the store: id, text, text_pair, source, asked_label, and the teacher's label and its score."""
        row = self.store.slice(position, 1).to_pylist()[0]
        label, score = self.named(np.asarray(row.pop("teacher_probs")))
        return row | {"label": label, "score": score}

    def named(self, answer: np.ndarray) -> tuple[str, float]:
        """The label of an answer (C,) and its probability; in regression the value as text and as number."""
        if len(answer) == 1:
            return f"{answer[0]:.3g}", float(answer[0])
        best = int(answer.argmax())
        return self.task["labels"][best], float(answer[best])

    def info(self) -> dict[str, Any]:
        """What is served: task, labels, sizes, mixture, index."""
        return {
            "task": self.task["name"],
            "problem": self.task["problem"],
            "labels": self.task["labels"],
            "pair": self.task["pair"],
            "student": {"kind": self.student.model.config.kind, "parameters": self.student.model.parameter_count},
            "store": {"rows": self.store.num_rows},
            "index": {"factory": self.searcher.card["factory"], "shards": len(self.searcher.shards), "width": self.searcher.width},
            "mixture": asdict(self.mixture),
        }
