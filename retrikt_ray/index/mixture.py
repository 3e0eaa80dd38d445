"""How the student and what it retrieves are mixed, and the fitting of that mixture. Pure functions of arrays.

Four voices: the student; `dense`, the mean of the nearest rows' teacher labels, weighted by softmax of similarity / tau over k;
`lexical`, the same over the rows with the highest BM25 scores; `ngrams`, the n-gram memory. The answer is their logarithmic opinion pool
(Genest & Zidek, Statistical Science 1986): p is proportional to the product of p_voice ^ weight. In regression it is the weighted mean.
A voice that finds nothing for a text leaves its weight to the student. What is known of the classes' frequencies may weigh in, see `settled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrikt_ray.task.metrics import answers_of, losses

KS, MOST = (8, 16, 32, 64), 64
TAUS, LEXICAL_TAUS = (0.02, 0.05, 0.1), (0.5, 1.0, 2.0, 4.0)
FLOOR = 0.02  # of a voice's probability mass that is spread over all classes: no neighbour has a label's probability at nought for certain
NAMES = ("student", "dense", "lexical", "ngrams")
# Standard errors of a gain, where it is not 1. Either search takes longer than all else in an answer; true rows alone are few.
DOUBT = {"dense": 3.0, "lexical": 3.0, "truth": 2.0}


@dataclass(frozen=True)
class Mixture:
    """How much each voice counts, and how neighbours vote. In regression the weights add up to 1."""

    student: float
    dense: float
    lexical: float
    ngrams: float
    k: int
    tau: float
    lexical_k: int
    lexical_tau: float  # in units of BM25 scores
    prior: Sequence[float] = ()  # added to the log-odds of each class; none: nothing


ALONE = Mixture(1.0, 0.0, 0.0, 0.0, 8, 0.05, 8, 1.0)


@dataclass(frozen=True)
class Votes:
    """Neighbours of Q queries."""

    scores: np.ndarray  # (Q, k) similarities or BM25 scores, best first, -inf where there is none
    labels: np.ndarray  # (Q, k, C)


Voice = tuple[np.ndarray, np.ndarray]  # (Q, C) answers, and 1 for a query that the voice has found something for, else 0, (Q, 1)


def vote(scores: np.ndarray, labels: np.ndarray, tau: float) -> np.ndarray:
    """Mean of the neighbours' labels, weighted by softmax of score / tau. scores (Q, k), -inf where there is none; labels (Q, k, C) -> (Q, C)"""
    best = scores.max(1, keepdims=True)
    weights = np.exp((scores - np.where(np.isfinite(best), best, 0)) / tau)
    weights /= weights.sum(1, keepdims=True).clip(1e-12)  # a query that found nothing gets no vote
    return np.einsum("qk,qkc->qc", weights, labels)


def cast(votes: Votes, k: int, tau: float) -> Voice:
    """The vote of the first k neighbours."""
    k = min(k, votes.scores.shape[1])
    return vote(votes.scores[:, :k], votes.labels[:, :k], tau), np.isfinite(votes.scores[:, :k]).any(1, keepdims=True).astype(np.float64)


def voices_of(dense: Votes | None, lexical: Votes | None, ngrams: Voice | None, mixture: Mixture) -> dict[str, Voice]:
    """What speaks beside the student, by name; None: was not asked."""
    found = {}
    if dense is not None:
        found["dense"] = cast(dense, mixture.k, mixture.tau)
    if lexical is not None:
        found["lexical"] = cast(lexical, mixture.lexical_k, mixture.lexical_tau)
    return found | ({"ngrams": ngrams} if ngrams is not None else {})


def mix(student: np.ndarray, voices: dict[str, Voice], mixture: Mixture) -> np.ndarray:
    """(Q, C) answers of the student (Q, C) and other voices together; one that is not there counts as having found nothing."""
    own = scale(student.astype(np.float64))
    answers, left = np.zeros_like(own), np.full((len(own), 1), sum(getattr(mixture, name) for name in NAMES))
    for name, (said, found) in voices.items():
        weight = getattr(mixture, name) * found
        answers += weight * scale(said)
        left -= weight
    return answers_of(answers + left * own + (mixture.prior or 0.0))


def without(name: str, student: np.ndarray, voices: dict[str, Voice], mixture: Mixture) -> np.ndarray:
    """(Q, C) answers as they would be if one voice had not spoken; NaN where nothing is left.

    The student stands in for another voice, as everywhere; the others, in proportion to their weights, for the student.
    """
    if name != "student":
        return mix(student, {n: v for n, v in voices.items() if n != name}, mixture)
    weights = {n: getattr(mixture, n) * found for n, (_, found) in voices.items()}
    total = sum(weights.values(), np.zeros((len(student), 1)))
    added = sum((w * scale(voices[n][0]) for n, w in weights.items()), np.zeros(student.shape))
    share = sum(getattr(mixture, n) for n in NAMES) / np.where(total > 0, total, np.nan)
    return answers_of(added * share + (mixture.prior or 0.0))


def scale(answers: np.ndarray) -> np.ndarray:
    """What is added up: log-probabilities, or values where there is one output. `answers_of` is the way back."""
    return answers if answers.shape[-1] == 1 else np.log((1 - FLOOR) * answers + FLOOR / answers.shape[-1])


def fit_mixture(
    targets: np.ndarray, student: np.ndarray, dense: Votes, lexical: Votes, ngrams: Voice, names: Sequence[str] = NAMES, gold: int = 0
) -> Mixture:
    """The mixture for rows that none of the voices has learnt from. targets: (Q, C) label distributions, or (Q, 1) values, of which the first
    `gold` are true, the others the teacher's; names: who may speak.

    Where the student alone answers the true rows better than what the teacher's rows chose, the teacher is not to be believed: the true rows
    choose alone, since it would be mixed into ever more of its own errors.
    """
    fitted = best_mixture(targets, student, dense, lexical, ngrams, names)
    if 0 < gold < len(targets) and "student" in names:
        answers = mix(student, voices_of(dense, lexical, ngrams, fitted), fitted)[:gold]
        if pays("truth", losses(answers, targets[:gold]) - losses(mix(student, {}, ALONE)[:gold], targets[:gold])):
            few = [Votes(votes.scores[:gold], votes.labels[:gold]) for votes in (dense, lexical)]
            fitted = best_mixture(targets[:gold], student[:gold], few[0], few[1], (ngrams[0][:gold], ngrams[1][:gold]), names)
    if targets.shape[1] == 1:
        return fitted
    return settled(fitted, targets[:gold], mix(student, voices_of(dense, lexical, ngrams, fitted), fitted)[:gold])


def best_mixture(
    targets: np.ndarray, student: np.ndarray, dense: Votes, lexical: Votes, ngrams: Voice, names: Sequence[str] = NAMES
) -> Mixture:
    """The mixture with the smallest loss over all rows.

    k and tau of each side are those whose vote alone has the smallest loss. Then the best voice is taken, and others are added, the one that
    lowers the loss most first, as long as the gain pays.
    """
    dense_k, dense_tau = best_vote(targets, dense, TAUS)
    lexical_k, lexical_tau = best_vote(targets, lexical, LEXICAL_TAUS)
    start = replace(ALONE, k=dense_k, tau=dense_tau, lexical_k=lexical_k, lexical_tau=lexical_tau)
    voices = voices_of(dense, lexical, ngrams, start)

    def tried(chosen: tuple[str, ...]) -> tuple[Mixture, np.ndarray]:
        weights: dict[str, Any] = fit_weights(targets, student, {n: v for n, v in voices.items() if n in chosen}, "student" in chosen)
        mixture = replace(start, **weights)
        return mixture, losses(mix(student, voices, mixture), targets)

    chosen: tuple[str, ...] = ()
    best, loss = ALONE, np.zeros(0)
    while left := [name for name in names if name not in chosen]:
        trials = {name: tried((*chosen, name)) for name in left}
        if chosen:
            left = [name for name in left if pays(name, loss - trials[name][1])]
        if not left:
            break
        name = min(left, key=lambda n: float(trials[n][1].mean()))
        chosen, (best, loss) = (*chosen, name), trials[name]
    return best


def settled(mixture: Mixture, truth: np.ndarray, answers: np.ndarray) -> Mixture:
    """The mixture with the classes' frequencies in it, and less trust in its voices, where this lowers the loss of gold rows beyond noise.

    Voices say what the teacher would, who was mostly taught as many rows of each class, and perhaps in vain: where it knows nothing of the
    task, the commonest class is the better answer. truth (n, C): one-hot; answers (n, C): the mixture's. p ~ answer ^ trust * frequency ^ weight.
    """
    from scipy.optimize import minimize

    count, classes = truth.shape
    if not count:
        return mixture
    prior = np.log((truth.sum(0) + 1) / (count + classes) * classes)
    said = np.stack([np.log(answers.clip(1e-12)), np.broadcast_to(prior, truth.shape)])

    def pooled(a: np.ndarray) -> np.ndarray:
        return answers_of(np.einsum("v,vqc->qc", a, said))

    def loss(a: np.ndarray) -> tuple[float, np.ndarray]:
        return float(losses(pooled(a), truth).mean()), np.einsum("vqc,qc->v", said, pooled(a) - truth) / count

    trust, weight = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0, 1), (0, 1)]).x.round(4)
    gain = losses(answers, truth) - losses(pooled(np.array([trust, weight])), truth)
    if not pays("prior", gain):
        return mixture
    voices: dict[str, Any] = {name: round(float(trust * getattr(mixture, name)), 4) for name in NAMES}
    return replace(mixture, **voices, prior=tuple((weight * prior).round(4).tolist()))


def pays(name: str, gain: np.ndarray) -> bool:
    """Whether a voice lowers the loss beyond noise. gain: (Q,) by row."""
    return bool(gain.mean() > DOUBT.get(name, 1.0) * gain.std() / np.sqrt(len(gain)))


def best_vote(targets: np.ndarray, votes: Votes, taus: tuple[float, ...]) -> tuple[int, float]:
    """k and tau of the vote over the rows that have neighbours: the fewest neighbours whose loss is within a standard error of the smallest."""
    some = np.isfinite(votes.scores[:, 0])
    if not some.any():
        return KS[0], taus[0]
    part, wanted = Votes(votes.scores[some], votes.labels[some]), targets[some]
    by_pair = {(k, tau): losses(answers_of(scale(cast(part, k, tau)[0])), wanted) for k in KS for tau in taus}
    best = min(by_pair.values(), key=lambda loss: float(loss.mean()))

    def near(loss: np.ndarray) -> bool:
        return bool((loss - best).mean() <= (loss - best).std() / np.sqrt(len(loss)))

    k = next(k for k in KS if any(near(by_pair[k, tau]) for tau in taus))
    return k, min(taus, key=lambda tau: float(by_pair[k, tau].mean()))


def fit_weights(targets: np.ndarray, student: np.ndarray, voices: dict[str, Voice], own: bool) -> dict[str, float]:
    """Weights with the smallest loss, none below 0, of the voices and, where `own`, of the student. A convex problem."""
    from scipy.optimize import minimize, nnls

    base = scale(student.astype(np.float64))
    names = [*voices, *(["student"] if own else [])]
    # What a voice has not found the student says.
    said = np.stack([*(found * scale(p) + (1 - found) * base for p, found in voices.values()), *([base] if own else [])])
    if base.shape[1] == 1:
        # The row of ones asks for a sum of 1. It costs no more than a factor, so what is smallest of all sums of 1 is found up to that.
        errors = (said - targets)[:, :, 0].T
        weights = nnls(np.vstack([errors, np.ones(len(names))]), np.append(np.zeros(len(errors)), 1))[0]
        weights = weights / weights.sum()
    else:

        def loss(a: np.ndarray) -> tuple[float, np.ndarray]:
            added = np.einsum("v,vqc->qc", a, said)
            answers = answers_of(added)
            return float(losses(answers, targets).mean()), np.einsum("vqc,qc->v", said, answers - targets) / len(targets)

        start = np.full(len(names), 1 / len(names))
        weights = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, 4)] * len(names)).x.round(4)
        weights = weights if weights.any() else start
    return dict.fromkeys(NAMES, 0.0) | {name: round(float(w), 4) for name, w in zip(names, weights, strict=True)}
