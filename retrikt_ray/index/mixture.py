"""How the student and the rows that it retrieves are mixed, and the fitting of that mixture. Pure functions of arrays.

p = (1 - d - l) p_student + d p_dense + l p_lexical, where p_dense is the mean of the nearest rows' teacher labels, weighted by softmax of
similarity / tau over k, and p_lexical the same over the rows with the highest BM25 scores. Weights, k and tau are fitted on validation by
the index stage. In regression the same mixture is of values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from retrikt_ray.task.metrics import loss


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
            share, found = cast(votes, k, tau)
            answers += weight * found * share
            left -= weight * found
    return answers + left * student


def fit_mixture(truth: np.ndarray, student: np.ndarray, dense: Votes, lexical: Votes) -> Mixture:
    """The mixture with the smallest validation loss; the student alone where no mixture beats it.

    k and tau of each side are chosen with the student alone beside it, then the weights of both together: few choices for few rows.
    """

    def best(some: list[Mixture]) -> Mixture:
        return min(some, key=lambda m: loss(truth, mix(student, dense, lexical, m)))

    weights = TENTHS[1:]
    dense_best = best([replace(ALONE, student=round(1 - w, 1), dense=w, k=k, tau=tau) for k in KS for tau in TAUS for w in weights])
    words = [(k, tau, w) for k in KS for tau in LEXICAL_TAUS for w in weights]
    lexical_best = best([replace(ALONE, student=round(1 - w, 1), lexical=w, lexical_k=k, lexical_tau=tau) for k, tau, w in words])
    pairs = [(a, b) for a in TENTHS for b in TENTHS if a + b < 0.95]
    both = [
        Mixture(round(1 - a - b, 1), a, b, dense_best.k, dense_best.tau, lexical_best.lexical_k, lexical_best.lexical_tau) for a, b in pairs
    ]
    return best([ALONE, *both])
