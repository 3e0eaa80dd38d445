"""The mixture of student and neighbours: expected values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retrikt_ray.predictor import GRID, Mixture, fit_mixture, loss, mix, vote

TAU = 0.1
STEP = TAU * math.log(3)  # a similarity this much smaller weighs a third


def close(got: np.ndarray, want: list[list[float]]) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_vote() -> None:
    similarities = np.array([[0.9, 0.9 - STEP], [0.4, 0.4]])
    labels = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.2, 0.8], [0.6, 0.4]]])
    close(vote(similarities, labels, TAU), [[0.75, 0.25], [0.4, 0.6]])  # weights 3 : 1, then 1 : 1


def test_vote_passes_over_neighbours_that_are_not_there() -> None:
    labels = np.array([[[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]]])  # position -1 points at some row; its weight must be 0
    close(vote(np.array([[0.2, -np.inf, -np.inf]]), labels, TAU), [[0.3, 0.7]])


def test_vote_does_not_overflow() -> None:
    close(vote(np.array([[1.0, -1.0]]), np.array([[[1.0], [5.0]]]), 1e-4), [[1.0]])


def test_mix_uses_k_neighbours_and_the_weights() -> None:
    student = np.array([[0.5, 0.5]])
    similarities = np.array([[0.9, 0.9 - STEP, 0.9 - STEP]])
    labels = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    # k = 2: vote (3/4, 1/4). 0.6 * 0.5 + 0.4 * 0.75 = 0.6. k = 9: all three, vote (3/5, 2/5): 0.3 + 0.24.
    close(mix(student, similarities, labels, Mixture(0.6, 0.4, 2, TAU)), [[0.6, 0.4]])
    close(mix(student, similarities, labels, Mixture(0.6, 0.4, 9, TAU)), [[0.54, 0.46]])
    close(mix(student, similarities, labels, Mixture(1.0, 0.0, 2, TAU)), [[0.5, 0.5]])


def test_mix_without_any_neighbour_is_the_student() -> None:
    """Lists of an IVF index may all be empty: the answer must stay a distribution."""
    student, similarities = np.array([[0.9, 0.1], [0.5, 0.5]]), np.array([[-np.inf, -np.inf], [0.9, -np.inf]])
    labels = np.array([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    close(mix(student, similarities, labels, Mixture(0.6, 0.4, 2, TAU)), [[0.9, 0.1], [0.3, 0.7]])


def test_loss() -> None:
    answers = np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    want = -(math.log(0.75) + math.log(0.5) + math.log(1e-6)) / 3  # a probability of 0 is floored at 1e-6
    assert loss(np.array([1.0, 0.0, 1.0]), answers) == pytest.approx(want, abs=1e-12)
    assert loss(np.array([1.0, 4.0]), np.array([[2.0], [1.0]])) == pytest.approx((1 + 9) / 2, abs=1e-12)


def test_grid_weights_sum_to_one() -> None:
    assert len(GRID) == len(set(GRID)) == 4 * 3 * 9
    assert all(m.student + m.dense == pytest.approx(1.0, abs=1e-12) and m.student > 0 for m in GRID)


def validation(rows: int, neighbours: int, right_from: int, right_to: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth 0 everywhere; equally similar neighbours, of which those at right_from .. right_to - 1 vote for class 0."""
    labels = np.tile(np.array([0.0, 1.0]), (rows, neighbours, 1))
    labels[:, right_from:right_to] = [1.0, 0.0]
    return np.zeros(rows), np.full((rows, neighbours), 0.5), labels


def test_fit_mixture_takes_the_student_alone_where_neighbours_only_harm() -> None:
    truth, similarities, labels = validation(5, 64, 0, 0)
    fitted = fit_mixture(truth, np.tile([0.9, 0.1], (5, 1)), similarities, labels)
    assert (fitted.student, fitted.dense) == (1.0, 0.0)


def test_fit_mixture_takes_the_student_alone_where_nothing_is_gained() -> None:
    truth, similarities, labels = validation(5, 64, 0, 64)
    fitted = fit_mixture(truth, np.tile([1.0, 0.0], (5, 1)), similarities, labels)  # all mixtures give the same answers
    assert (fitted.student, fitted.dense) == (1.0, 0.0)


@pytest.mark.parametrize(("right_to", "k"), [(8, 8), (16, 16), (32, 32), (64, 64)])
def test_fit_mixture_finds_weight_and_k(right_to: int, k: int) -> None:
    """Neighbours are right up to k. The student says 0.5 in one half and 1 in the other, so a vote of 1 should weigh all it may: 0.9.

    k smaller than `right_to` gives the same vote, and then the smallest k wins; so a wrong one stands in front of the right ones.
    """
    truth, similarities, labels = validation(6, 64, 0, right_to)
    if k > 8:
        labels[:, : k // 2] = [0.0, 1.0]  # half of the first k are wrong, so that fewer than k are all wrong
    fitted = fit_mixture(truth, np.tile([[0.5, 0.5], [0.3, 0.7]], (3, 1)), similarities, labels)
    # k = 8: vote 1. Else the first k/2 are wrong and the next k/2 right: vote 1/2 at k, 0 at k/2, less than 1/2 at 2k.
    assert fitted.k == k
    assert (fitted.student, fitted.dense) == (0.1, 0.9)


def test_fit_mixture_finds_tau() -> None:
    """The nearest neighbour is right, the 63 others, 0.1 less similar, are wrong: the sharper the vote, the better."""
    truth, similarities, labels = validation(4, 64, 0, 1)
    similarities[:, 1:] = 0.4
    fitted = fit_mixture(truth, np.tile([0.5, 0.5], (4, 1)), similarities, labels)
    assert fitted == Mixture(0.1, 0.9, 8, 0.02)


def test_fit_mixture_in_regression() -> None:
    # Student 1, neighbours 2, truth 1.7: w 1 + (1 - w) 2 = 1.7 at w = 0.3.
    fitted = fit_mixture(np.full(4, 1.7), np.ones((4, 1)), np.full((4, 64), 0.5), np.full((4, 64, 1), 2.0))
    assert (fitted.student, fitted.dense) == (0.3, 0.7)
