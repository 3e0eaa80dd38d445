"""Reward terms on texts small enough to count by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from retrikt_ray.policy import rewards
from retrikt_ray.runtime.settings import ConfigError


def close(got: np.ndarray, want: list[float]) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_fidelity_is_the_log_of_the_asked_class_between_a_floor_and_a_margin() -> None:
    probs = np.array([[0.25, 0.75], [0.25, 0.75], [1.0, 0.0], [0.99, 0.01]])
    close(rewards.fidelity(probs, np.array([0, 1, 1, 0])), [math.log(0.25), math.log(0.75), math.log(1e-4), math.log(0.8)])


def test_closeness() -> None:
    close(rewards.closeness(np.array([1.0, 4.0]), np.array([3.0, 3.5]), scale=2.0), [-1.0, -0.25])


def test_novelty() -> None:
    seen = {("a", "fine"), ("fine", "film")}
    # "a fine plot": 1 of 2 bigrams is new; "a fine film": none; one word has no bigrams.
    close(rewards.novelty(["A fine plot", "a fine film", "plot", "b c d"], seen), [0.5, 0.0, 0.0, 1.0])
    close(rewards.novelty(["电影好", "电影"], {("电", "影")}), [0.5, 0.0])  # without spaces, by character


def test_nearness_is_the_mean_of_the_best_cosines() -> None:
    task = np.array([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [3.0, 4.0]])  # cosines to (1, 0): 1, 0, -1, 0.6
    similar = rewards.cosines(np.array([[7.0, 0.0]]), task)
    close(similar[0], [1, 0, -1, 0.6])
    close(rewards.nearest(similar, 2), [0.8])
    close(rewards.domain(np.array([[7.0, 0.0], [0.0, 0.1]]), task), [0.15, (0 + 1 + 0 + 0.8) / 4])  # all four
    close(rewards.domain(np.array([[0.0, 0.0]]), task[:1]), [0.0])


def test_rows_among_each_other() -> None:
    # Two rows at 60 degrees, and one opposite to the first: the means over the other two are (0.5 - 1) / 2, (0.5 - 0.5) / 2 and (-1 - 0.5) / 2.
    mean, spread = rewards.among(np.array([[1.0, 0.0], [0.5, math.sqrt(0.75)], [-1.0, 0.0]]))
    assert mean == pytest.approx(-1 / 3) and spread == pytest.approx(np.std([-0.25, 0.0, -0.75]))
    assert rewards.among(np.array([[1.0, 0.0]])) == (1.0, 1.0)  # nothing to compare with


def test_coverage_is_the_distance_to_the_nearest_earlier_row() -> None:
    earlier = np.array([[1.0, 0.0], [0.0, 3.0]])
    close(rewards.coverage(np.array([[2.0, 0.0], [-1.0, 0.0], [3.0, 4.0]]), earlier), [0.0, 1.0, 0.2])


def test_disagreement_counts_in_the_domain() -> None:
    teacher, student = np.array([[0.5, 0.5]] * 3), np.array([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]])
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    # At the rows' own mean the chance is a half; two spreads below, 1 / (1 + e^2).
    close(rewards.disagreement(teacher, student, np.array([0.6, 0.4, 0.6]), (0.6, 0.1)), [kl / 2, kl / (1 + math.e**2), 0.0])


def test_outside_a_band() -> None:
    close(rewards.outside(np.array([-6.0, -5.0, -4.0, -3.0, -1.0]), (-5.0, -3.0)), [-1, 0, 0, 0, -2])


def test_scale_counts_in_spreads_from_each_conditions_middle() -> None:
    terms = {"a": np.array([1.0, 3.0, 10.0, 10.0]), "b": np.array([2.0, 2.0, 2.0, 2.0])}
    asked = np.array([0, 0, 1, 1])
    scale = rewards.Scale.of(terms, asked, 3)
    # The mean of all is 6 and counts as four texts: (4 + 24) / 6, (20 + 24) / 6, and 6 for a condition without texts.
    middles = [28 / 6, 44 / 6, 6.0]
    assert scale.middles["a"] == pytest.approx(middles)
    spread = np.std([1 - middles[0], 3 - middles[0], 10 - middles[1], 10 - middles[1]])
    assert scale.spreads == {"a": pytest.approx(spread), "b": 0.0}
    close(scale("a", np.array([middles[2] + spread / 2, middles[0] - 9 * spread]), np.array([2, 0])), [0.5, -3.0])  # capped
    close(scale("b", np.array([2.5]), np.array([1])), [0.5])  # all were alike: no spread to count in


def test_length() -> None:
    counts, ended = np.array([5, 10, 3, 15, 30, 10, 0]), np.array([1, 1, 1, 1, 1, 0, 1])
    # Within [5, 10]: 1. 3 tokens: 1 - 2/5. 15: 1 - 5/10. 30: at most 1 is taken off. Cut at 10: 1 - 1. None: 1 - 5/5.
    close(rewards.length(counts, ended, low=5, high=10), [1, 1, 0.6, 0.5, 0, 0, 0])


def batch(regression: bool) -> rewards.Batch:
    """Two texts, asked for conditions 1 and 0, where every term can be worked in the head."""
    rows = rewards.TaskRows(
        embeddings=np.array([[1.0, 0.0]]),
        bigrams={("a", "fine")},
        near=(0.6, 0.1),
        low=3.0,
        high=4.0,
        likelihood=(-2.5, -1.0),
        values=np.array([1.0, 5.0]),
        spread=2.0,
        regression=regression,
    )
    return rewards.Batch(
        texts=["a fine film", "a dull film"],
        asked=np.array([1, 0]),
        answers=np.array([[2.0], [1.5]]) if regression else np.array([[0.75, 0.25], [0.5, 0.5]]),
        embeddings=np.array([[0.0, 1.0], [3.0, 4.0]]),
        likelihood=np.array([-2.0, -3.0]),
        tokens=np.array([4, 6]),
        ended=np.array([True, False]),
        seen=rewards.Seen(
            {("a", "fine"), ("dull", "film")},
            np.array([[1.0, 0.0], [0.0, 2.0]]),
            None if regression else lambda texts: np.array([[0.5, 0.5]] * len(texts)),
        ),
        rows=rows,
    )


def test_every_term_has_a_weight() -> None:
    assert list(rewards.TERMS) == list(rewards.RewardWeights.model_fields)


def test_terms_read_what_they_should() -> None:
    # Overlap of either text with the other: unigrams 2/3, bigrams 0, trigrams 0; its mean is 2/9.
    # 6 tokens where 4 are the most, and cut: 1 - 2/4 - 1.
    want = {
        "fidelity": [math.log(0.25), math.log(0.5)],
        "diversity": [7 / 9, 7 / 9],
        "novelty": [0.5, 0.5],
        "domain": [0.0, 0.6],
        "coverage": [0.0, 0.2],
        "disagreement": [(0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / (1 + math.e**6), 0.0],
        "fluency": [0.0, -0.5],
        "length": [1.0, -0.5],
    }
    for name, values in want.items():
        close(rewards.TERMS[name](batch(regression=False)), values)
    assert list(want) == list(rewards.TERMS)


def test_fidelity_in_regression_is_closeness_to_the_condition() -> None:
    # Asked for 5 and 1, found 2 and 1.5, spread 2.
    close(rewards.TERMS["fidelity"](batch(regression=True)), [-1.5, -0.25])
    close(rewards.TERMS["disagreement"](batch(regression=True)), [0.0, 0.0])


def test_custom_term() -> None:
    assert rewards.custom_term("json:dumps") is json.dumps
    assert rewards.custom_term("os.path:join")("a", "b") == "a/b"


@pytest.mark.parametrize("path", ["json:no_such", "no_such_package:f", "json", ":f", ""])
def test_custom_term_that_is_not_there(path: str) -> None:
    with pytest.raises(ConfigError, match=r"reinforce\.custom_rewards: .*expected package\.module:function") as error:
        rewards.custom_term(path)
    assert repr(path) in str(error.value)
