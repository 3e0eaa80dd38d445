"""What RetriKT has to beat without a student: majority and TF-IDF, each fitted to a `System`. (Student baselines: `systems.py`.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from retrikt_ray.task.texts import Text, joined

PAIR_MARK = " \x1f "  # between the texts of a pair


class System(NamedTuple):
    """A fitted system: texts -> answers (N, C) or (N, 1), and how many numbers it holds."""

    answer: Callable[[list[Text]], np.ndarray]
    parameters: int


def majority(truth: np.ndarray, classes: int) -> System:
    """The commonest class, or the mean in regression (classes = 0)."""
    answer = np.array([truth.mean()]) if not classes else np.bincount(truth.astype(int), minlength=classes) / len(truth)
    return System(lambda texts: np.tile(answer, (len(texts), 1)), max(1, classes))


def tfidf(texts: list[Text], targets: np.ndarray, regression: bool, validation: tuple[list[Text], np.ndarray], metric: str) -> System:
    """TF-IDF of words and word pairs with logistic regression (ridge in regression); C chosen on validation.

    targets: (N, C) soft labels or (N, 1) values. A soft label counts as C weighted copies of its row, which is exact for the loss; classes
    below 1 % are left out, so that 77 classes do not make 77 copies.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    from retrikt_ray.task.metrics import score

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")
    features = vectorizer.fit_transform([joined(t, PAIR_MARK) for t in texts])
    if not regression:
        rows, classes = np.nonzero(targets >= 0.01)
        features, weights = sparse.csr_matrix(features[rows]), targets[rows, classes]
    best: tuple[float, Any] | None = None
    for strength in (1.0, 10.0, 100.0):
        if regression:
            model = Ridge(alpha=1 / strength).fit(features, targets[:, 0])
        else:
            model = LogisticRegression(C=strength, max_iter=300).fit(features, classes, sample_weight=weights)

        def answer(some: list[Text], model: Any = model) -> np.ndarray:
            found = vectorizer.transform([joined(t, PAIR_MARK) for t in some])
            if regression:
                return np.asarray(model.predict(found))[:, None]
            out = np.zeros((len(some), targets.shape[1]))
            out[:, model.classes_] = model.predict_proba(found)
            return out

        got = score(metric, validation[1], answer(validation[0]))
        if best is None or got > best[0]:
            best = (got, System(answer, int(np.size(model.coef_) + np.size(model.intercept_))))
    assert best is not None
    return best[1]
