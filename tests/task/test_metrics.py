"""Scores and their intervals: expected values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from retrikt_ray.task import metrics


def one_hot(classes: list[int], count: int) -> np.ndarray:
    """Sure answers."""
    return np.eye(count)[classes]


def test_decide() -> None:
    assert metrics.decide(np.array([[0.2, 0.5, 0.3], [0.9, 0.1, 0.0]])).tolist() == [1, 0]
    assert metrics.decide(np.array([[0.2], [7.5]])).tolist() == [0.2, 7.5]


def test_accuracy() -> None:
    assert metrics.score("accuracy", [0, 1, 1, 2], one_hot([0, 1, 2, 2], 3)) == 0.75


def test_matthews() -> None:
    # TP 2, TN 1, FP 1, FN 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2) = 1/6
    assert metrics.score("matthews", [1, 1, 1, 0, 0], one_hot([1, 1, 0, 1, 0], 2)) == pytest.approx(1 / 6, abs=1e-12)


def test_macro_f1() -> None:
    # Class 0: precision 1/2, recall 1, F1 2/3. Class 1: precision 1, recall 2/3, F1 4/5.
    assert metrics.score("macro_f1", [0, 1, 1, 1], one_hot([0, 0, 1, 1], 2)) == pytest.approx((2 / 3 + 4 / 5) / 2, abs=1e-12)


def test_correlations() -> None:
    truth, answers = [1.0, 2.0, 3.0], np.array([[1.0], [2.0], [9.0]])
    # Pearson: deviations (-1, 0, 1) and (-3, -2, 5): 8 / sqrt(2 * 38). Spearman: the order is the same.
    assert metrics.score("pearson", truth, answers) == pytest.approx(8 / math.sqrt(76), abs=1e-12)
    assert metrics.score("spearman", truth, answers) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_constant_prediction_shows_no_skill(metric: str) -> None:
    assert metrics.score(metric, [1.0, 2.0, 3.0], np.full((3, 1), 2.0)) == 0.0
    assert metrics.score(metric, [2.0, 2.0, 2.0], np.array([[1.0], [2.0], [3.0]])) == 0.0


def test_bootstrap_interval() -> None:
    truth = np.array([0, 1] * 50)
    assert metrics.bootstrap_ci95("accuracy", truth, one_hot(truth.tolist(), 2)) == 0.0  # all right in every resample
    half = truth.copy()
    half[:50] = 1 - half[:50]
    # Half of 100 rows right: 1.96 sqrt(0.25 / 100) = 0.098; 500 resamples and steps of 0.01 leave some play.
    width = metrics.bootstrap_ci95("accuracy", truth, one_hot(half.tolist(), 2))
    assert width == pytest.approx(0.098, abs=0.015)


def test_intervals_are_repeatable() -> None:
    truth, answers = np.arange(30.0), np.sqrt(np.arange(30.0) * 7 % 30)[:, None]
    assert metrics.bootstrap_ci95("pearson", truth, answers) == metrics.bootstrap_ci95("pearson", truth, answers) > 0


def test_paired_interval_knows_that_the_rows_are_the_same() -> None:
    truth = np.array([0, 1] * 50)
    first, second = truth.copy(), truth.copy()
    first[:40], second[:50] = 1 - truth[:40], 1 - truth[:50]  # first is right on 60 rows, second on 50 of the same
    difference, half = metrics.paired_ci95("accuracy", truth, one_hot(first.tolist(), 2), one_hot(second.tolist(), 2))
    assert difference == pytest.approx(0.1, abs=1e-12)
    # 10 rows of 100 differ: 1.96 sqrt(0.1 * 0.9 / 100) = 0.059; two independent samples would give 0.137.
    assert half == pytest.approx(0.059, abs=0.01)
    difference, half = metrics.paired_ci95("accuracy", truth, one_hot(second.tolist(), 2), one_hot(second.tolist(), 2))
    assert (difference, half) == (0.0, 0.0)


def test_reliability() -> None:
    truth = np.array([0, 0, 1, 1])
    probs = np.array([[0.92, 0.08], [0.08, 0.92], [0.45, 0.55], [0.0, 1.0]])
    rows, error = metrics.reliability(truth, probs)
    # Bin [0.9, 1]: confidences 0.92, 0.92, 1.0, right, wrong, right. Bin [0.5, 0.6): 0.55, right.
    low, high = {"confidence": 0.55, "accuracy": 1.0, "count": 1}, {"confidence": 2.84 / 3, "accuracy": 2 / 3, "count": 3}
    assert rows == [pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12)]
    assert error == pytest.approx((1 * 0.45 + 3 * (2.84 / 3 - 2 / 3)) / 4, abs=1e-12)


def test_losses() -> None:
    answers = np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])
    targets = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.4, 0.6]])
    want = [-math.log(0.75), -math.log(0.5), -math.log(1e-6), -0.4 * math.log(0.2) - 0.6 * math.log(0.8)]  # 0 is floored at 1e-6
    np.testing.assert_allclose(metrics.losses(answers, targets), want, rtol=0, atol=1e-12)
    assert metrics.losses(np.array([[2.0], [1.0]]), np.array([[1.0], [4.0]])).tolist() == [1, 9]


def test_one_hot() -> None:
    assert metrics.one_hot(np.array([1.0, 0.0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert metrics.one_hot(np.array([1.5, -2.0]), 1).tolist() == [[1.5], [-2.0]]


@pytest.mark.parametrize("values", [[1.0, 2.0], [70.1, 68.4, 73.3, 71.0, 69.9]])
def test_an_interval_over_seeds(values: list[float]) -> None:
    low, high = stats.t.interval(0.95, len(values) - 1, loc=0, scale=stats.sem(values))
    assert metrics.seeds_ci95(values) == pytest.approx((high - low) / 2, rel=1e-12)


def test_an_interval_over_seeds_by_hand() -> None:
    assert metrics.seeds_ci95([1.0, 3.0]) == pytest.approx(
        12.706205, abs=1e-5
    )  # standard error 1; the 97.5 % quantile of t with one degree of freedom
    assert math.isnan(metrics.seeds_ci95([1.0])) and metrics.seeds_ci95([2.0, 2.0]) == 0
