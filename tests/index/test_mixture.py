"""The mixture of the four voices: expected values worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from retrikt_ray.index.mixture import (
    ALONE,
    FLOOR,
    KS,
    LEXICAL_TAUS,
    NAMES,
    TAUS,
    Mixture,
    Voice,
    Votes,
    best_vote,
    cast,
    fit_mixture,
    fit_weights,
    mix,
    pays,
    scale,
    settled,
    voices_of,
    vote,
    without,
)
from retrikt_ray.task.metrics import answers_of, losses

TAU, LEXICAL_TAU = 0.1, 2.0
STEP, LEXICAL_STEP = TAU * math.log(3), LEXICAL_TAU * math.log(3)  # a score this much smaller weighs a third
NONE = -np.inf


def close(got: np.ndarray, want: list[list[float]], within: float = 1e-12) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=within)


def mixture(student: float, dense: float = 0.0, lexical: float = 0.0, ngrams: float = 0.0) -> Mixture:
    return Mixture(student, dense, lexical, ngrams, 2, TAU, 2, LEXICAL_TAU)


def says(answers: list[list[float]], found: list[float] | None = None) -> Voice:
    return np.array(answers), np.array(found or [1.0] * len(answers))[:, None]


def pooled(*said: tuple[float, float]) -> list[float]:
    """Of two classes, from (probability of the first, weight) by voice: the odds, the floor on either side, to the power of the weight."""
    odds = math.prod(((0.98 * p + 0.01) / (0.98 * (1 - p) + 0.01)) ** w for p, w in said)
    return [odds / (1 + odds), 1 / (1 + odds)]


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


def test_voices_vote_with_k_and_tau_of_their_own_side() -> None:
    """Three neighbours, the second and third a third as good by the tau of their side."""
    labels = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    dense, lexical = Votes(np.array([[0.9, 0.9 - STEP, 0.9 - STEP]]), labels), Votes(np.array([[7.0, *[7 - LEXICAL_STEP] * 2]]), labels)
    ngrams = says([[0.2, 0.8]])
    found = voices_of(dense, lexical, ngrams, Mixture(1.0, 1.0, 1.0, 1.0, 3, TAU, 2, LEXICAL_TAU))
    close(found["dense"][0], [[0.6, 0.4]])  # 3 : 1 + 1
    close(found["lexical"][0], [[0.75, 0.25]])  # 3 : 1
    assert found["ngrams"] is ngrams and [*found] == ["dense", "lexical", "ngrams"]
    assert [*voices_of(None, lexical, None, ALONE)] == ["lexical"]


# mix


def test_mix_is_the_product_of_powers() -> None:
    voices = {"dense": says([[0.75, 0.25]]), "lexical": says([[0.25, 0.75]]), "ngrams": says([[0.9, 0.1]])}
    student = np.array([[0.6, 0.4]])
    got = mix(student, voices, mixture(0.5, 0.3, 0.2, 0.7))
    close(got, [pooled((0.6, 0.5), (0.75, 0.3), (0.25, 0.2), (0.9, 0.7))])
    # Three sure voices beat one: 0.745 / 0.255 = 2.92 for each of two, 1 / 2.92 for the third; weights 1.
    close(mix(student, voices | {"ngrams": says([[0.75, 0.25]])}, mixture(0.0, 1.0, 1.0, 1.0)), [pooled((0.75, 1.0))])


def test_one_voice_is_sharpened_by_its_weight_above_a_floor() -> None:
    alone = np.array([[0.9, 0.1], [1.0, 0.0]])
    close(mix(alone, {}, mixture(1.0)), [[0.892, 0.108], [0.99, 0.01]])  # 0.98 p + 0.02 / 2
    first = 0.892**2 / (0.892**2 + 0.108**2)
    close(mix(alone[:1], {}, mixture(2.0)), [[first, 1 - first]])
    close(mix(np.array([[1.0, 0.0, 0.0, 0.0]]), {}, mixture(1.0)), [[0.985, 0.005, 0.005, 0.005]])  # 0.02 / 4


def test_the_weight_of_a_voice_that_was_not_asked_goes_to_the_student() -> None:
    student, voices = np.array([[0.9, 0.1]]), {"dense": says([[0.75, 0.25]]), "ngrams": says([[0.2, 0.8]])}
    m = mixture(0.5, 0.3, 0.2, 0.4)
    close(mix(student, voices, m), [pooled((0.9, 0.7), (0.75, 0.3), (0.2, 0.4))])
    close(mix(student, {}, m), [pooled((0.9, 1.4))])


def test_mix_of_queries_that_found_nothing() -> None:
    """Lists of an IVF index may be empty, and a text may share no word: each query's answer is its own, whatever the others found."""
    student, away = np.array([[0.9, 0.1]] * 4), [0.0, 0.0]
    voices = {
        "dense": says([[0.0, 1.0], away, [0.0, 1.0], away], [1, 0, 1, 0]),
        "lexical": says([[0.5, 0.5], [0.5, 0.5], away, away], [1, 1, 0, 0]),
    }
    want = [
        pooled((0.9, 0.5), (0.0, 0.3), (0.5, 0.2)),
        pooled((0.9, 0.8), (0.5, 0.2)),
        pooled((0.9, 0.7), (0.0, 0.3)),
        pooled((0.9, 1.0)),
    ]
    close(mix(student, voices, mixture(0.5, 0.3, 0.2)), want)


def test_mix_in_regression_is_the_weighted_mean() -> None:
    student = np.array([[1.0], [1.0]])
    voices = {"dense": says([[3.0], [4.0]]), "lexical": says([[-2.0], [0.0]], [1, 0]), "ngrams": says([[2.0], [5.0]])}
    close(mix(student, voices, mixture(0.4, 0.3, 0.2, 0.1)), [[0.4 + 0.9 - 0.4 + 0.2], [0.6 + 1.2 + 0.5]])


def test_mix_does_not_change_what_it_is_given() -> None:
    student, voice = np.array([[0.9, 0.1]]), says([[0.2, 0.8]])
    mix(student, {"ngrams": voice}, mixture(0.5, 0.0, 0.0, 0.5))
    assert student.tolist() == [[0.9, 0.1]] and voice[0].tolist() == [[0.2, 0.8]] and voice[1].tolist() == [[1.0]]


# choosing k and tau


def right_between(rows: int, low: int, high: int) -> Votes:
    """Equally good neighbours, of which those at low .. high - 1 vote for class 0, the truth, and all others for class 1."""
    labels = np.tile(np.array([0.0, 1.0]), (rows, 64, 1))
    labels[:, low:high] = [1.0, 0.0]
    return Votes(np.full((rows, 64), 0.5), labels)


def nothing(rows: int, classes: int = 2) -> Votes:
    """A side on which no query found a row."""
    return Votes(np.full((rows, 64), NONE), np.ones((rows, 64, classes)))


def first_class(rows: int) -> np.ndarray:
    return np.tile([1.0, 0.0], (rows, 1))


@pytest.mark.parametrize("k", KS)
def test_k(k: int) -> None:
    """Of the neighbours k/2 .. k - 1 are right (of 8: all): the vote for the truth is 1/2 at k (1 for 8), 0 at k/2 and 1/4 at 2k."""
    votes = right_between(6, 0 if k == 8 else k // 2, k)
    assert best_vote(first_class(6), votes, TAUS) == (k, TAUS[0])  # the taus tie
    votes.scores[4:] = NONE  # rows without neighbours have no say
    votes.labels[4:] = [0.0, 1.0]
    assert best_vote(first_class(6), votes, TAUS) == (k, TAUS[0])


@pytest.mark.parametrize(("taus", "tau"), [*((TAUS, t) for t in TAUS), *((LEXICAL_TAUS, t) for t in LEXICAL_TAUS)])
def test_tau(taus: tuple[float, ...], tau: float) -> None:
    """The best neighbour says 0, seven that are tau ln 7 behind it say 1: at this tau they weigh the same, and the vote is 1/2, the truth."""
    scores = np.full((3, 8), 0.6 - tau * math.log(7))
    scores[:, 0] = 0.6
    labels = np.ones((3, 8, 1))
    labels[:, 0] = 0.0
    assert best_vote(np.full((3, 1), 0.5), Votes(scores, labels), taus) == (8, tau)


def test_fewer_neighbours_where_more_gain_nothing_beyond_noise() -> None:
    """A query whose first eight neighbours are wrong gains from 64, one of which all but these are wrong loses; their losses are not equal."""
    votes = right_between(100, 0, 64)
    votes.labels[0, :8], votes.labels[1, 8:] = [0.0, 1.0], [0.0, 1.0]
    by_hand = {8: -math.log(0.01) - math.log(0.99), 64: -math.log(0.98 * 7 / 8 + 0.01) - math.log(0.98 / 8 + 0.01)}
    assert by_hand[64] < by_hand[8] - 2
    assert best_vote(first_class(100), votes, TAUS) == (8, TAUS[0])
    votes = right_between(100, 0, 64)
    votes.labels[:20, :8] = [0.0, 1.0]  # twenty that gain, and none that loses
    assert best_vote(first_class(100), votes, TAUS) == (64, TAUS[0])


def test_k_and_tau_where_nothing_was_found() -> None:
    assert best_vote(first_class(3), nothing(3), LEXICAL_TAUS) == (KS[0], LEXICAL_TAUS[0])


def test_each_side_has_the_k_that_is_its_own() -> None:
    student = np.tile([[0.5, 0.5], [0.3, 0.7]], (3, 1))
    fitted = fit_mixture(first_class(6), student, right_between(6, 8, 16), right_between(6, 32, 64), says([[0.5, 0.5]] * 6))
    assert (fitted.k, fitted.lexical_k) == (16, 64)


# weights


def test_the_weight_of_one_voice_is_how_much_too_shy_it_is() -> None:
    # It says 0.7, floored 0.696 : 0.304; the truth is 0.9 : 0.1. (0.696 / 0.304)^w = 9.
    answers, targets = np.tile([0.7, 0.3], (5, 1)), np.tile([0.9, 0.1], (5, 1))
    assert fit_weights(targets, answers, {}, True)["student"] == pytest.approx(math.log(9) / math.log(0.696 / 0.304), abs=0.01)
    assert fit_weights(first_class(5), answers, {}, True)["student"] == 4  # the most that one may weigh
    voice = says([[0.7, 0.3]] * 5)
    assert fit_weights(targets, answers[:, ::-1], {"ngrams": voice}, False) == {
        "student": 0,
        "dense": 0,
        "lexical": 0,
        "ngrams": pytest.approx(math.log(9) / math.log(0.696 / 0.304), abs=0.01),
    }


def test_a_voice_that_is_wrong_weighs_nothing() -> None:
    good, bad = [[0.8, 0.2], [0.3, 0.7], [0.9, 0.1]], [[0.2, 0.8], [0.7, 0.3], [0.1, 0.9]]
    fitted = fit_weights(np.eye(2)[[0, 1, 0]], np.array(good), {"dense": says(bad)}, True)
    assert fitted["dense"] == 0 < fitted["student"]


def test_weights_are_never_all_nought() -> None:
    """Which would leave no answer at all: a voice that is always wrong, and alone, keeps its word."""
    assert fit_weights(first_class(3), np.tile([0.1, 0.9], (3, 1)), {}, True)["student"] == 1


def simulated(rng: np.random.Generator, rows: int, classes: int, sure: float) -> np.ndarray:
    """Answers of a voice to rows whose truth is their number modulo the classes: log-odds for the truth, in noise."""
    logits = rng.normal(size=(rows, classes)) + sure * np.eye(classes)[np.arange(rows) % classes]
    return answers_of(logits)


@pytest.mark.parametrize("classes", [2, 5])
def test_weights_have_the_smallest_loss(classes: int) -> None:
    """The loss is convex, so a point from which no small step leads down is the best. Some queries find nothing."""
    rng = np.random.default_rng(classes)
    targets, student = 0.9 * np.eye(classes)[np.arange(60) % classes] + 0.1 / classes, simulated(rng, 60, classes, 0.5)
    voices = {
        name: (simulated(rng, 60, classes, sure), (rng.random((60, 1)) < 0.8).astype(float))
        for name, sure in (("dense", 1.0), ("lexical", 0.0), ("ngrams", 0.7))
    }
    fitted = fit_weights(targets, student, voices, True)

    def loss(**weights: float) -> float:
        return losses(mix(student, voices, Mixture(**(fitted | weights), k=8, tau=1, lexical_k=8, lexical_tau=1)), targets).mean()

    assert sum(w > 0 for w in fitted.values()) >= 2
    for name, weight in fitted.items():
        for other in (weight + 0.02, weight - 0.02):
            if other >= 0:
                assert loss(**{name: other}) > loss()


def test_weights_in_regression() -> None:
    """In each query one of the three says 1 and the others 0, and the truth is its weight."""
    truth = np.array([[0.5], [0.2], [0.3]])
    voices = {"dense": says([[0.0], [1.0], [0.0]]), "ngrams": says([[0.0], [0.0], [1.0]])}
    assert fit_weights(truth, np.array([[1.0], [0.0], [0.0]]), voices, True) == {
        "student": pytest.approx(0.5, abs=1e-4),
        "dense": pytest.approx(0.2, abs=1e-4),
        "lexical": 0,
        "ngrams": pytest.approx(0.3, abs=1e-4),
    }


def test_weights_in_regression_are_the_best_of_those_that_sum_to_1() -> None:
    """A says twice the truth, B 0.4 of it: 2 a + 0.4 (1 - a) = 1 at a = 0.375. Half of A would be right, too, but is no mean."""
    truth = np.array([[1.0], [-2.0], [3.0]])
    fitted = fit_weights(truth, 2 * truth, {"dense": (0.4 * truth, np.ones((3, 1)))}, True)
    assert (fitted["student"], fitted["dense"]) == (pytest.approx(0.375, abs=1e-4), pytest.approx(0.625, abs=1e-4))
    # In noise: as SciPy finds it under that constraint.
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(50, 1))
    said = [f * truth + rng.normal(scale=0.5, size=(50, 1)) + shift for f, shift in ((0.8, 0.3), (1.3, -0.2), (0.5, 0.1))]
    want = minimize(
        lambda w: float(((sum(x * s for x, s in zip(w, said, strict=True)) - truth) ** 2).mean()),
        np.full(3, 1 / 3),
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        tol=1e-12,
    ).x
    fitted = fit_weights(truth, said[0], {"dense": (said[1], np.ones((50, 1))), "ngrams": (said[2], np.ones((50, 1)))}, True)
    np.testing.assert_allclose([fitted[n] for n in ("student", "dense", "ngrams")], want, atol=1e-3)


# who may speak


def test_pays() -> None:
    two, one = np.array([0.0, 2.0, 0.0, 2.0]), np.array([-1.0, 3.0, -1.0, 3.0])  # mean 1; standard error 1/2, and 1
    assert pays("student", two) and pays("ngrams", two) and not pays("ngrams", one)
    assert not pays("lexical", two) and not pays("dense", two)  # each costs more time than all others: 3 standard errors
    assert pays("lexical", np.array([0.5, 1.5, 0.5, 1.5])) and not pays("ngrams", np.zeros(4)) and not pays("ngrams", -two)


@pytest.mark.parametrize("same", [True, False])
def test_the_student_speaks_alone_where_neighbours_harm_or_add_nothing(same: bool) -> None:
    """A good student needs no vote: not of voices that know nothing, nor of such that say the same."""
    rng = np.random.default_rng(1)
    targets, student = np.eye(3)[np.arange(200) % 3], simulated(rng, 200, 3, 2.0)
    others = [student if same else simulated(rng, 200, 3, 0.0) for _ in range(3)]
    fitted = fit_mixture(targets, student, votes_like(others[0]), votes_like(others[1]), (others[2], np.ones((200, 1))))
    assert fitted.student > 0 and (fitted.dense, fitted.lexical, fitted.ngrams) == (0, 0, 0)


def test_the_student_speaks_alone_where_nothing_was_found() -> None:
    fitted = fit_mixture(np.eye(2)[[0, 1, 1]], np.array([[0.4, 0.6]] * 3), nothing(3), nothing(3), says([[0.0, 0.0]] * 3, [0.0] * 3))
    assert fitted.student > 0 and (fitted.dense, fitted.lexical, fitted.ngrams) == (0, 0, 0)


@pytest.mark.parametrize("right", ["dense", "lexical", "ngrams"])
def test_a_voice_that_is_right_speaks_alone(right: str) -> None:
    wrong, good = right_between(6, 0, 0), right_between(6, 0, 64)
    student = np.tile([[0.5, 0.5], [0.3, 0.7]], (3, 1))
    dense, lexical = good if right == "dense" else wrong, good if right == "lexical" else wrong
    fitted = fit_mixture(first_class(6), student, dense, lexical, says([[1.0, 0.0] if right == "ngrams" else [0.0, 1.0]] * 6))
    assert {name for name in NAMES if getattr(fitted, name)} == {right}


def test_true_rows_choose_alone_where_they_contradict_the_teacher() -> None:
    """The n-grams say what a teacher says who knows nothing; its 600 rows want them, 100 true ones do not."""
    rng = np.random.default_rng(5)
    truth = np.arange(700) % 2
    teacher = np.concatenate([truth[:100], rng.permutation(truth[100:])])
    student = simulated(rng, 700, 2, 2.0)
    ngrams = 0.9 * np.eye(2)[np.concatenate([rng.permutation(truth[:100]), teacher[100:]])] + 0.05
    heard = student, nothing(700), nothing(700), (ngrams, np.ones((700, 1)))
    assert fit_mixture(np.eye(2)[teacher], *heard).ngrams > 0.5
    fitted = fit_mixture(np.eye(2)[teacher], *heard, gold=100)
    assert fitted.student > 0 and fitted.ngrams == 0
    assert fit_mixture(np.eye(2)[teacher], *heard, gold=700).ngrams > 0.5  # nobody else to believe
    right = np.concatenate([ngrams[100:200], ngrams[100:]])  # of rows that are true, too: then all choose
    same = np.eye(2)[np.concatenate([teacher[100:200], teacher[100:]])]
    heard = student, nothing(700), nothing(700), (right, np.ones((700, 1)))
    assert fit_mixture(same, *heard, gold=100).ngrams == fit_mixture(same, *heard).ngrams


def votes_like(answers: np.ndarray) -> Votes:
    """Neighbours that all say the same."""
    return Votes(np.full((len(answers), 8), 0.5), np.repeat(answers[:, None], 8, 1))


def test_voices_that_each_know_something_speak_together() -> None:
    """Four independent witnesses, as sure as each other; BM25 is in as its gain is far beyond the noise."""
    rng = np.random.default_rng(0)
    targets = np.eye(3)[np.arange(600) % 3]
    student, dense, lexical, ngrams = (simulated(rng, 600, 3, 1.0) for _ in NAMES)
    fitted = fit_mixture(targets, student, votes_like(dense), votes_like(lexical), (ngrams, np.ones((600, 1))))
    # Each voice's logits are normal around (1, 0, 0), so what they say is the truth's log-odds, and those of independent witnesses add up.
    assert all(getattr(fitted, name) == pytest.approx(1, abs=0.25) for name in NAMES)
    quiet = fit_mixture(targets, student, votes_like(dense), votes_like(lexical), (ngrams, np.ones((600, 1))), ("student", "ngrams"))
    assert (quiet.dense, quiet.lexical) == (0, 0) and quiet.student > 0 < quiet.ngrams


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), classes=st.sampled_from([1, 2, 4]), rows=st.integers(2, 40))
def test_never_worse_than_the_best_single_voice(seed: int, classes: int, rows: int) -> None:
    """On the rows that it is fitted on, each voice alone having its best weight or 1."""
    rng = np.random.default_rng(seed)
    if classes == 1:
        targets = rng.normal(size=(rows, 1))
        said = [rng.uniform(0, 2) * targets + rng.normal(scale=rng.uniform(0.1, 2), size=(rows, 1)) for _ in NAMES]
    else:
        targets = 0.9 * np.eye(classes)[np.arange(rows) % classes] + 0.1 / classes
        said = [simulated(rng, rows, classes, rng.uniform(-1, 2)) for _ in NAMES]
    student, dense, lexical, ngrams = said
    dense_votes, lexical_votes, found = votes_like(dense), votes_like(lexical), (rng.random((rows, 1)) < 0.8).astype(float)
    fitted = fit_mixture(targets, student, dense_votes, lexical_votes, (ngrams, found))
    weights = [getattr(fitted, name) for name in NAMES]
    assert min(weights) >= 0 and sum(weights) > 0
    if classes == 1:
        assert sum(weights) == pytest.approx(1, abs=3e-4)
    voices = voices_of(dense_votes, lexical_votes, (ngrams, found), fitted)
    loss = losses(mix(student, voices, fitted), targets).mean()
    for name in NAMES:
        for weight in (0.5, 1.0, 2.0) if classes > 1 else (1.0,):
            alone = Mixture(**dict.fromkeys(NAMES, 0.0) | {name: weight}, k=8, tau=TAU, lexical_k=8, lexical_tau=LEXICAL_TAU)
            assert loss <= losses(mix(student, voices, alone), targets).mean() + 1e-3


# frequencies


def test_frequencies_are_added_to_the_log_odds() -> None:
    """Odds 3 of the first class, times e."""
    answer, prior = np.array([[0.75, 0.25]]), (0.5, -0.5)
    odds = pooled((0.75, 2.0))[0] / pooled((0.75, 2.0))[1] * math.e
    settled_mixture = replace(mixture(2.0), prior=prior)
    close(mix(answer, {}, settled_mixture), [[odds / (1 + odds), 1 / (1 + odds)]])
    voices = {"ngrams": says([[0.75, 0.25]])}
    close(without("student", answer, voices, replace(mixture(1.0, ngrams=1.0), prior=prior)), [[odds / (1 + odds), 1 / (1 + odds)]])
    close(without("ngrams", answer, voices, replace(mixture(1.0, ngrams=1.0), prior=prior)), [[odds / (1 + odds), 1 / (1 + odds)]])


def test_where_the_voices_know_nothing_the_commonest_class_is_answered() -> None:
    """Answers without a relation to the truth, four of five rows of the first class."""
    rng = np.random.default_rng(0)
    truth, answers = np.eye(2)[(np.arange(200) % 5 == 0).astype(int)], simulated(rng, 200, 2, 0.0)
    found = settled(mixture(1.0), truth, mix(answers, {}, mixture(1.0)))
    assert found.student < 0.1 and mix(answers, {}, found).argmax(1).sum() == 0
    # log of (161 / 202 * 2) and of (41 / 202 * 2), the counts being one up, if all of the frequencies is taken.
    assert found.prior == pytest.approx([math.log(322 / 202), math.log(82 / 202)], abs=0.05)


def test_frequencies_say_nothing_where_they_are_even_or_voices_know_better() -> None:
    rng = np.random.default_rng(1)
    even, uneven = np.eye(2)[np.arange(200) % 2], np.eye(2)[(np.arange(200) % 5 == 0).astype(int)]
    answers = simulated(rng, 200, 2, 0.0)
    found = settled(ALONE, even, mix(answers, {}, ALONE))
    assert found.student < 0.1 and list(found.prior) == [0, 0]  # it trusts them less, and decides as they do
    sure = 0.9 * uneven + 0.05  # they know which rows are of the rare class
    assert (mix(sure, {}, settled(ALONE, uneven, mix(sure, {}, ALONE))).argmax(1) == uneven.argmax(1)).all()
    assert settled(ALONE, uneven[:0], sure[:0]) == ALONE


def test_only_true_labels_count_as_frequencies() -> None:
    """The teacher's labels, which come behind them, are all of the second class."""
    rng = np.random.default_rng(0)
    truth = np.eye(2)[(np.arange(200) % 5 == 0).astype(int)]
    student = simulated(rng, 400, 2, 0.0)
    targets = np.concatenate([truth, np.tile([0.0, 1.0], (200, 1))])
    with_gold, none = (fit_mixture(targets, student, nothing(400), nothing(400), says([[0, 0]] * 400, [0] * 400), gold=n) for n in (200, 0))
    assert with_gold.prior[0] > 0.2 and not none.prior


def test_scale_and_back() -> None:
    answers = np.array([[0.7, 0.2, 0.1]])
    close(answers_of(scale(answers)), ((1 - FLOOR) * answers + FLOOR / 3).tolist())
    close(answers_of(np.array([[1000.0, 0.0]])), [[1.0, 0.0]])
    values = np.array([[3.5], [-1.0]])
    assert answers_of(scale(values)).tolist() == values.tolist()
