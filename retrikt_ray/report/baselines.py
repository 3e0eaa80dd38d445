"""What RetriKT has to beat without a student: majority and TF-IDF, each fitted to a `System`. (Student baselines: `systems.py`.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from retrikt_ray.task.texts import Text, joined
from retrikt_ray.task.words import WORD

PAIR_MARK = " \ue000 "  # between the texts of a pair; a mark that is neither a word's nor white space, and in no text
STRENGTHS = (1.0, 10.0, 100.0)  # C of logistic regression, 1 / alpha of ridge
STEPS = 300  # of L-BFGS


class System(NamedTuple):
    """A fitted system: texts -> answers (N, C) or (N, 1), and how many numbers it holds."""

    answer: Callable[[list[Text]], np.ndarray]
    parameters: int


def majority(truth: np.ndarray, classes: int) -> System:
    """The commonest class, or the mean in regression (classes = 0)."""
    answer = np.array([truth.mean()]) if not classes else np.bincount(truth.astype(int), minlength=classes) / len(truth)
    return System(lambda texts: np.tile(answer, (len(texts), 1)), max(1, classes))


def tfidf(
    texts: list[Text],
    targets: np.ndarray,
    validation: tuple[list[Text], np.ndarray],
    metric: str,
    most: int | None = None,
) -> System:
    """TF-IDF of words and word pairs with logistic regression on soft labels (ridge in regression); C chosen on validation.

    targets: (N, C) soft labels or (N, 1) values. most: numbers that the model may hold at most, for its commonest features.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        token_pattern=rf"{WORD}|[^\w\s]",
        max_features=None if most is None else max(1, most // targets.shape[1]),
    )
    features = vectorizer.fit_transform([joined(t, PAIR_MARK) for t in texts])
    return linear(features, targets, lambda some: vectorizer.transform([joined(t, PAIR_MARK) for t in some]), validation, metric)


def linear(
    features: Any, targets: np.ndarray, features_of: Callable[[list[Text]], Any], validation: tuple[list[Text], np.ndarray], metric: str
) -> System:
    """Multinomial logistic regression of features (N, F) on soft labels (N, C), or ridge on values (N, 1); C chosen on validation.

    The same loss as scikit-learn's with every row repeated once a class, weighted by the class's probability, without the copies.
    """
    from retrikt_ray.index.learning import fitted
    from retrikt_ray.task.metrics import answers_of, score

    shift = targets.mean(0) if targets.shape[1] == 1 else np.zeros(targets.shape[1])
    best: tuple[float, System] | None = None
    for strength in STRENGTHS:
        weights, bias = fitted(features, targets - shift, np.zeros_like(targets), True, STEPS, strength)

        def answer(some: list[Text], weights: Any = weights, bias: Any = bias) -> np.ndarray:
            return answers_of(features_of(some) @ weights + bias + shift)

        got = score(metric, validation[1], answer(validation[0]))
        if best is None or got > best[0]:
            best = (got, System(answer, weights.size + bias.size))
    assert best is not None
    return best[1]
