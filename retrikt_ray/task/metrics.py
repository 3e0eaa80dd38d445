"""Scores and their uncertainty. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev

import numpy as np


def decide(answers: np.ndarray) -> np.ndarray:
    """The decision of each row: the likeliest class of (N, C) probabilities, or the value of (N, 1) predictions. (N,)"""
    return answers[:, 0] if answers.shape[1] == 1 else answers.argmax(1)


def score(metric: str, truth: Sequence[float] | np.ndarray, answers: np.ndarray) -> float:
    """The metric of answers (N, C or 1) against truth (N,): class ids, or numbers in regression.

    A correlation with a constant prediction is undefined; it counts as 0, as no skill was shown.
    """
    from scipy import stats  # here, for they take a second to import, which answering a text does not need
    from sklearn.metrics import f1_score, matthews_corrcoef

    truth, got = np.asarray(truth), decide(np.asarray(answers))
    if metric == "accuracy":
        return float((truth == got).mean())
    if metric == "matthews":
        return float(matthews_corrcoef(truth, got))
    if metric == "macro_f1":
        return float(f1_score(truth, got, average="macro"))
    if np.ptp(got) == 0 or np.ptp(truth) == 0:
        return 0.0
    return float((stats.pearsonr if metric == "pearson" else stats.spearmanr)(truth, got).statistic)


def losses(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Cross-entropy of each answer (N, C) to its target distribution, or squared error of values (N, 1): smoother than accuracy on few rows. (N,)"""
    if answers.shape[1] == 1:
        return np.asarray((answers[:, 0] - targets[:, 0]) ** 2)
    return np.asarray(-(targets * np.log(np.clip(answers, 1e-6, 1))).sum(1))


def answers_of(logits: np.ndarray) -> np.ndarray:
    """Probabilities by softmax over the classes (last axis); values as they are where there is one output."""
    if logits.shape[-1] == 1:
        return logits
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def one_hot(truth: np.ndarray, outputs: int) -> np.ndarray:
    """True class ids (N,) as distributions (N, C); values (N,) as (N, 1) where outputs is 1."""
    return truth[:, None] if outputs == 1 else np.eye(outputs)[truth.astype(int)]


def seeds_ci95(values: Sequence[float]) -> float:
    """Half-width of Student's 95 % interval of a mean over seeds; NaN for one seed."""
    from scipy.stats import t as student_t

    n = len(values)
    return float(student_t.ppf(0.975, n - 1)) * stdev(values) / n**0.5 if n > 1 else float("nan")


def bootstrap_ci95(metric: str, truth: np.ndarray, answers: np.ndarray, rounds: int = 500) -> float:
    """Half-width of the 95 % bootstrap interval over the test rows (Efron 1979, percentile method)."""
    return _half_width([score(metric, truth[i], answers[i]) for i in _resamples(len(truth), rounds)])


def paired_ci95(metric: str, truth: np.ndarray, first: np.ndarray, second: np.ndarray, rounds: int = 500) -> tuple[float, float]:
    """Difference first - second on the same rows, and the half-width of its 95 % paired bootstrap interval."""
    differences = [score(metric, truth[i], first[i]) - score(metric, truth[i], second[i]) for i in _resamples(len(truth), rounds)]
    return score(metric, truth, first) - score(metric, truth, second), _half_width(differences)


def _resamples(count: int, rounds: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, count, count) for _ in range(rounds)]


def _half_width(values: list[float]) -> float:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(high - low) / 2


def reliability(truth: np.ndarray, probs: np.ndarray, bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """Reliability diagram and expected calibration error (Guo et al. 2017, section 2) with equal-width bins of the top probability.

    Returns one {confidence, accuracy, count} per bin that has rows, and the error.
    """
    top, right = probs.max(1), probs.argmax(1) == truth
    which = np.minimum((top * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        inside = which == b
        if inside.any():
            rows.append({"confidence": float(top[inside].mean()), "accuracy": float(right[inside].mean()), "count": int(inside.sum())})
    error = sum(r["count"] * abs(r["confidence"] - r["accuracy"]) for r in rows) / len(truth)
    return rows, float(error)
