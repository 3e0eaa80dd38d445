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


def test_fidelity_is_the_log_of_the_asked_class_with_a_floor() -> None:
    probs = np.array([[0.25, 0.75], [0.25, 0.75], [1.0, 0.0]])
    close(rewards.fidelity(probs, np.array([0, 1, 1])), [math.log(0.25), math.log(0.75), math.log(1e-4)])


def test_closeness() -> None:
    close(rewards.closeness(np.array([1.0, 4.0]), np.array([3.0, 3.5]), scale=2.0), [-1.0, -0.25])


def test_novelty() -> None:
    seen = {("a", "fine"), ("fine", "film")}
    # "a fine plot": 1 of 2 bigrams is new; "a fine film": none; one word has no bigrams.
    close(rewards.novelty(["A fine plot", "a fine film", "plot", "b c d"], seen), [0.5, 0.0, 0.0, 1.0])
    close(rewards.novelty(["电影好", "电影"], {("电", "影")}), [0.5, 0.0])  # without spaces, by character


def test_domain_is_the_mean_of_the_k_best_cosines() -> None:
    task = np.array([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [3.0, 4.0]])  # cosines to (1, 0): 1, 0, -1, 0.6
    close(rewards.domain(np.array([[7.0, 0.0]]), task, k=2), [0.8])
    close(rewards.domain(np.array([[7.0, 0.0], [0.0, 0.1]]), task, k=9), [0.15, (0 + 1 + 0 + 0.8) / 4])  # all four
    close(rewards.domain(np.array([[0.0, 0.0]]), task, k=1), [0.0])


def test_length() -> None:
    counts, ended = np.array([5, 10, 3, 15, 30, 10, 0]), np.array([1, 1, 1, 1, 1, 0, 1])
    # Within [5, 10]: 1. 3 tokens: 1 - 2/5. 15: 1 - 5/10. 30: at most 1 is taken off. Cut at 10: 1 - 1. None: 1 - 5/5.
    close(rewards.length(counts, ended, low=5, high=10), [1, 1, 0.6, 0.5, 0, 0, 0])


def batch(regression: bool) -> rewards.Batch:
    """Two texts, asked for conditions 1 and 0, where every term can be worked in the head."""
    rows = rewards.TaskRows(
        embeddings=np.array([[1.0, 0.0]]),
        bigrams={("a", "fine")},
        low=3.0,
        high=4.0,
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
        seen={("a", "fine"), ("dull", "film")},
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
        "fluency": [-2.0, -3.0],
        "length": [1.0, -0.5],
    }
    for name, values in want.items():
        close(rewards.TERMS[name](batch(regression=False)), values)
    assert list(want) == list(rewards.TERMS)


def test_fidelity_in_regression_is_closeness_to_the_condition() -> None:
    # Asked for 5 and 1, found 2 and 1.5, spread 2.
    close(rewards.TERMS["fidelity"](batch(regression=True)), [-1.5, -0.25])


def test_custom_term() -> None:
    assert rewards.custom_term("json:dumps") is json.dumps
    assert rewards.custom_term("os.path:join")("a", "b") == "a/b"


@pytest.mark.parametrize("path", ["json:no_such", "no_such_package:f", "json", ":f", ""])
def test_custom_term_that_is_not_there(path: str) -> None:
    with pytest.raises(ConfigError, match=r"reinforce\.custom_rewards: .*expected package\.module:function") as error:
        rewards.custom_term(path)
    assert repr(path) in str(error.value)
