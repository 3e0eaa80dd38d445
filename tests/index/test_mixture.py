"""The mixture of student and neighbours: expected values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retrikt_ray.index.mixture import KS, LEXICAL_TAUS, MOST, TAUS, TENTHS, Mixture, Votes, cast, fit_mixture, mix, vote

TAU, LEXICAL_TAU = 0.1, 2.0
STEP, LEXICAL_STEP = TAU * math.log(3), LEXICAL_TAU * math.log(3)  # a score this much smaller weighs a third
NONE = -np.inf


def close(got: np.ndarray, want: list[list[float]], within: float = 1e-12) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=within)


def mixture(student: float, dense: float, lexical: float, k: int = 2, lexical_k: int = 2) -> Mixture:
    return Mixture(student, dense, lexical, k, TAU, lexical_k, LEXICAL_TAU)


# votes


def test_vote() -> None:
    similarities = np.array([[0.9, 0.9 - STEP], [0.4, 0.4]])
    labels = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.2, 0.8], [0.6, 0.4]]])
    close(vote(similarities, labels, TAU), [[0.75, 0.25], [0.4, 0.6]])  # weights 3 : 1, then 1 : 1


def test_vote_passes_over_neighbours_that_are_not_there() -> None:
    labels = np.array([[[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]]])  # position -1 points at some row; its weight must be 0
    close(vote(np.array([[0.2, NONE, NONE]]), labels, TAU), [[0.3, 0.7]])


def test_vote_does_not_overflow() -> None:
    close(vote(np.array([[1.0, -1.0]]), np.array([[[1.0], [5.0]]]), 1e-4), [[1.0]])
    close(vote(np.array([[900.0, 100.0]]), np.array([[[1.0], [5.0]]]), 0.5), [[1.0]])  # BM25 has no upper bound


def test_cast_takes_the_first_k_and_says_who_found_any() -> None:
    votes = Votes(np.array([[5.0, 5.0 - LEXICAL_STEP, 5.0], [NONE, NONE, NONE]]), np.array([[[1.0], [5.0], [9.0]], [[4.0], [4.0], [4.0]]]))
    share, found = cast(votes, 2, LEXICAL_TAU)
    close(share, [[2.0], [0.0]])  # 3/4 * 1 + 1/4 * 5
    close(found, [[1.0], [0.0]])
    close(cast(votes, 9, LEXICAL_TAU)[0], [[(3 * 1 + 5 + 3 * 9) / 7], [0.0]])  # k beyond what was found: all three


# mix


def both_sides() -> tuple[np.ndarray, Votes, Votes]:
    """One query. Votes of the first two: dense (3/4, 1/4), lexical (1/4, 3/4); a third neighbour stands behind them."""
    dense = Votes(np.array([[0.9, 0.9 - STEP, 0.9 - STEP]]), np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]))
    lexical = Votes(np.array([[7.0, 7.0 - LEXICAL_STEP, 7.0 - LEXICAL_STEP]]), np.array([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]]))
    return np.array([[0.5, 0.5]]), dense, lexical


def test_mix_of_both_sides() -> None:
    student, dense, lexical = both_sides()
    # 0.5 * 0.5 + 0.3 * 0.75 + 0.2 * 0.25 = 0.25 + 0.225 + 0.05
    close(mix(student, dense, lexical, mixture(0.5, 0.3, 0.2)), [[0.525, 0.475]])
    # 0.2 * 0.5 + 0.1 * 0.75 + 0.7 * 0.25 = 0.1 + 0.075 + 0.175
    close(mix(student, dense, lexical, mixture(0.2, 0.1, 0.7)), [[0.35, 0.65]])


def test_mix_uses_k_and_tau_of_either_side() -> None:
    student, dense, lexical = both_sides()
    # k 9: all three, dense (3/5, 2/5): 0.25 + 0.3 * 0.6 + 0.05. lexical_k 1: the first alone, (0, 1): 0.25 + 0.225 + 0.
    close(mix(student, dense, lexical, mixture(0.5, 0.3, 0.2, k=9)), [[0.48, 0.52]])
    close(mix(student, dense, lexical, mixture(0.5, 0.3, 0.2, lexical_k=1)), [[0.475, 0.525]])
    # A tau twice as large: a step weighs 1 / sqrt(3) instead of 1/3.
    flat = 1 / (1 + math.sqrt(3))
    for m, first in (
        (Mixture(0.5, 0.3, 0.2, 2, 2 * TAU, 2, LEXICAL_TAU), 0.25 + 0.3 * (1 - flat) + 0.05),
        (Mixture(0.5, 0.3, 0.2, 2, TAU, 2, 2 * LEXICAL_TAU), 0.25 + 0.225 + 0.2 * flat),
    ):
        close(mix(student, dense, lexical, m), [[first, 1 - first]])


def test_mix_of_one_side() -> None:
    student, dense, lexical = both_sides()
    close(mix(student, dense, lexical, mixture(0.6, 0.4, 0.0)), [[0.6, 0.4]])  # 0.6 * 0.5 + 0.4 * 0.75
    close(mix(student, dense, lexical, mixture(0.6, 0.0, 0.4)), [[0.4, 0.6]])  # 0.6 * 0.5 + 0.4 * 0.25
    close(mix(student, dense, lexical, mixture(1.0, 0.0, 0.0)), [[0.5, 0.5]])


def test_mix_gives_the_weight_of_a_side_that_was_not_searched_to_the_student() -> None:
    student, dense, lexical = np.array([[0.9, 0.1]]), *both_sides()[1:]
    close(mix(student, dense, None, mixture(0.5, 0.3, 0.2)), [[0.855, 0.145]])  # 0.7 * 0.9 + 0.3 * 0.75
    close(mix(student, None, lexical, mixture(0.5, 0.3, 0.2)), [[0.77, 0.23]])  # 0.8 * 0.9 + 0.2 * 0.25
    close(mix(student, None, None, mixture(0.5, 0.3, 0.2)), [[0.9, 0.1]])


def test_mix_of_queries_that_found_nothing() -> None:
    """Lists of an IVF index may be empty, and a text may share no word: each query stays a distribution, whatever the others found."""
    student = np.array([[0.9, 0.1]] * 4)
    dense = Votes(np.array([[0.5, NONE], [NONE, NONE], [0.5, NONE], [NONE, NONE]]), np.tile([[0.0, 1.0], [1.0, 0.0]], (4, 1, 1)))
    lexical = Votes(np.array([[3.0, NONE], [3.0, NONE], [NONE, NONE], [NONE, NONE]]), np.tile([[0.5, 0.5], [1.0, 0.0]], (4, 1, 1)))
    # both: 0.5 * 0.9 + 0 + 0.1; lexical alone: 0.8 * 0.9 + 0.1; dense alone: 0.7 * 0.9 + 0; neither: the student
    close(mix(student, dense, lexical, mixture(0.5, 0.3, 0.2)), [[0.55, 0.45], [0.82, 0.18], [0.63, 0.37], [0.9, 0.1]])


def test_mix_in_regression() -> None:
    student = np.array([[1.0], [1.0]])
    dense = Votes(np.array([[0.9, 0.9 - STEP], [0.9, 0.9]]), np.array([[[2.0], [6.0]], [[2.0], [6.0]]]))  # votes 3 and 4
    lexical = Votes(np.array([[2.0, 2.0], [NONE, NONE]]), np.array([[[-4.0], [0.0]], [[7.0], [7.0]]]))  # vote -2, and none
    close(mix(student, dense, lexical, mixture(0.5, 0.3, 0.2)), [[0.5 + 0.9 - 0.4], [0.7 + 1.2]])


def test_mix_does_not_change_what_it_is_given() -> None:
    student, dense, lexical = both_sides()
    mix(student, dense, lexical, mixture(0.5, 0.3, 0.2))
    fresh, dense_before, lexical_before = both_sides()
    np.testing.assert_array_equal(student, fresh)
    for now, before in ((dense, dense_before), (lexical, lexical_before)):
        np.testing.assert_array_equal(now.scores, before.scores)
        np.testing.assert_array_equal(now.labels, before.labels)


# fitting


def test_choices() -> None:
    assert (KS, MOST, TAUS, LEXICAL_TAUS) == ((8, 16, 32, 64), 64, (0.02, 0.05, 0.1), (0.5, 1.0, 2.0, 4.0))
    assert TENTHS == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def nothing(rows: int, classes: int = 2) -> Votes:
    """A side on which no query found a row."""
    return Votes(np.full((rows, 64), NONE), np.ones((rows, 64, classes)))


def right_between(rows: int, low: int, high: int) -> Votes:
    """Equally good neighbours, of which those at low .. high - 1 vote for class 0, the truth, and all others for class 1."""
    labels = np.tile(np.array([0.0, 1.0]), (rows, 64, 1))
    labels[:, low:high] = [1.0, 0.0]
    return Votes(np.full((rows, 64), 0.5), labels)


def saying(values: list[float]) -> Votes:
    """In regression, eight neighbours a query that all say one value; NaN: none was found."""
    values_ = np.array(values)
    scores = np.where(np.isnan(values_), NONE, 0.5)
    return Votes(np.tile(scores[:, None], (1, 8)), np.tile(np.nan_to_num(values_)[:, None, None], (1, 8, 1)))


@pytest.mark.parametrize("right_to", [0, 64])
def test_fit_takes_the_student_alone_where_neighbours_harm_or_add_nothing(right_to: int) -> None:
    """A student that is right needs no vote: not of neighbours that are all wrong, nor of such that say the same."""
    votes = right_between(5, 0, right_to)
    fitted = fit_mixture(np.zeros(5), np.tile([1.0, 0.0], (5, 1)), votes, votes)
    assert (fitted.student, fitted.dense, fitted.lexical) == (1.0, 0.0, 0.0)


def test_fit_takes_the_student_alone_where_nothing_was_found() -> None:
    fitted = fit_mixture(np.zeros(3), np.tile([0.4, 0.6], (3, 1)), nothing(3), nothing(3))
    assert (fitted.student, fitted.dense, fitted.lexical) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("k", KS)
def test_fit_finds_the_side_that_helps_and_its_k(k: int) -> None:
    """Of the neighbours k/2 .. k - 1 are right (of 8: all), so that the vote for the truth is largest at k.

    It is 1/2 there (1 for 8), 0 at k/2 and 1/4 at 2k. The student gives the truth 0.5 in one half and 0.3 in the other, so the vote shall
    weigh all it may.
    """
    votes, student = right_between(6, 0 if k == 8 else k // 2, k), np.tile([[0.5, 0.5], [0.3, 0.7]], (3, 1))
    # The side that found nothing keeps the first of the choices, which tie.
    assert fit_mixture(np.zeros(6), student, votes, nothing(6)) == Mixture(0.1, 0.9, 0.0, k, 0.02, 8, 0.5)
    assert fit_mixture(np.zeros(6), student, nothing(6), votes) == Mixture(0.1, 0.0, 0.9, 8, 0.02, k, 0.5)


@pytest.mark.parametrize(("side", "tau"), [*(("dense", t) for t in TAUS), *(("lexical", t) for t in LEXICAL_TAUS)])
def test_fit_finds_tau(side: str, tau: float) -> None:
    """The best neighbour says 0, seven that are tau ln 7 behind it say 1: exactly at this tau they weigh the same, and the vote is 1/2.

    The student says 0.7, the truth is 0.1 * 0.7 + 0.9 * 1/2 = 0.52. A smaller tau can come near with less weight, a larger one cannot.
    """
    scores = np.full((3, 8), 0.6 - tau * math.log(7))
    scores[:, 0] = 0.6
    labels = np.ones((3, 8, 1))
    labels[:, 0] = 0.0
    votes, truth, student = Votes(scores, labels), np.full(3, 0.52), np.full((3, 1), 0.7)
    if side == "dense":
        assert fit_mixture(truth, student, votes, nothing(3, 1)) == Mixture(0.1, 0.9, 0.0, 8, tau, 8, 0.5)
    else:
        assert fit_mixture(truth, student, nothing(3, 1), votes) == Mixture(0.1, 0.0, 0.9, 8, 0.02, 8, tau)


def test_fit_finds_both_sides() -> None:
    """Dense neighbours are right for three queries, lexical ones for two others, and find nothing for the rest; the student says 1/2.

    The likelihood is (1/2 + d/2)^3 (1/2 + l/2)^2: 1.7^3 * 1.2^2 = 7.075 is more than 1.8^3 * 1.1^2 = 7.057 and 1.6^3 * 1.3^2 = 6.922.
    """
    dense, lexical = right_between(5, 0, 64), right_between(5, 0, 64)
    dense.scores[3:], lexical.scores[:3] = NONE, NONE
    fitted = fit_mixture(np.zeros(5), np.full((5, 2), 0.5), dense, lexical)
    assert fitted == Mixture(0.1, 0.7, 0.2, 8, 0.02, 8, 0.5)


@pytest.mark.parametrize(("student", "dense", "lexical"), [(0.5, 0.2, 0.3), (0.1, 0.8, 0.1), (0.8, 0.1, 0.1), (0.1, 0.1, 0.8)])
def test_fit_finds_three_weights_in_regression(student: float, dense: float, lexical: float) -> None:
    """In each query one of the three says 1 and the others 0, and the truth is its weight."""
    fitted = fit_mixture(
        np.array([student, dense, lexical]), np.array([[1.0], [0.0], [0.0]]), saying([0.0, 1.0, 0.0]), saying([0.0, 0.0, 1.0])
    )
    assert fitted == Mixture(student, dense, lexical, 8, 0.02, 8, 0.5)


def test_fit_in_regression_of_one_side() -> None:
    # Student 1, neighbours 2, truth 1.7: 0.3 * 1 + 0.7 * 2.
    nobody = saying([math.nan] * 4)
    truth, student, votes = np.full(4, 1.7), np.ones((4, 1)), saying([2.0] * 4)
    assert fit_mixture(truth, student, votes, nobody) == Mixture(0.3, 0.7, 0.0, 8, 0.02, 8, 0.5)
    assert fit_mixture(truth, student, nobody, votes) == Mixture(0.3, 0.0, 0.7, 8, 0.02, 8, 0.5)
