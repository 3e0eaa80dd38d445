"""Rates and stretched times, worked by hand."""

from __future__ import annotations

import pytest

from retrikt_ray.config import RunConfig
from retrikt_ray.estimate import scaling
from retrikt_ray.estimate.scaling import Part


def test_a_rate_is_the_slope_of_progress_not_of_the_start() -> None:
    """Workers need 8 s to start; then two of them write 10 rows each every 2 s."""
    found = scaling.part("generate", [(10, 10), (10, 20), (12, 30), (12, 40), (14, 50), (14, 60), (16, 70), (16, 80), (18, 90), (18, 100)])
    assert found is not None and found.units == 100 and found.rate == pytest.approx(10, rel=0.06) and found.doubt < 0.2
    warm = scaling.part("train", [(5, 1), (9, 2), *((9 + i / 10, 2 + i) for i in range(1, 11))])
    assert warm is not None and warm.rate == pytest.approx(10) and warm.doubt < 0.01  # the first, slow steps do not count
    slowing = scaling.part("generate", [*((i, 10 * i) for i in range(1, 9)), *((8 + i, 80 + 5 * i) for i in range(1, 5))])
    assert slowing is not None and 5 < slowing.rate < 10 and slowing.doubt > 0.2


def test_few_points_say_little() -> None:
    assert scaling.part("x", []) is None and scaling.part("x", [(0.0, 0)]) is None
    assert scaling.part("x", [(4.0, 2)]) == Part("x", 2, 0.5, scaling.FEW_POINTS)
    assert scaling.part("x", [(2.0, 1), (4.0, 2)]) == Part("x", 2, 0.5, scaling.FEW_POINTS)


def test_what_is_fixed_stays_and_the_rest_is_stretched() -> None:
    """20 s, of which 8 are 40 steps at 5 a second: ten times the steps are 12 + 80 s, and as unsure as their rate."""
    seconds, doubt = scaling.stretched(20, [Part("a", 40, 5, 0.1), Part("b", 4, 2, 0.5)], {"a": 10})
    assert seconds == pytest.approx(10 + 80 + 2) and doubt == pytest.approx(8)
    assert scaling.stretched(20, [Part("a", 40, 5, 0.1)], {"a": 1})[1] == 0
    assert scaling.stretched(5, [Part("a", 40, 5, 0.1)], {}) == (8, 0)  # never less than its parts


def test_amounts() -> None:
    config = RunConfig.model_validate(
        {
            "prepare": {"data": "x"},
            "generate": {"rows": 1000},
            "teach": {"prompt_epochs": 3},
            "distill": {"epochs": 2},
            "reinforce": {"steps": 5},
        }
    )
    found = scaling.amounts(config, 60, 40, 0, 8, 5000)
    assert found["teach: prompt"] == 180 and found["reinforce: prompt"] == 5
    assert found["annotate"] == 1100
    assert found["distill: student"] == (1000 + 800) * 2  # the 100 rows of the domain are repeated 8 times
    assert scaling.amounts(config, 60, 540, 0, 8, 5000)["distill: student"] == (1000 + 1000) * 2
    assert scaling.amounts(config, 60, 4940, 0, 8, 5000)["distill: student"] == (1000 + 5000) * 2
    assert (
        scaling.amounts(config, 60, 4940, 0, 8, 4940)["distill: student"] == (1000 + 5000 + 5000) * 2
    )  # once more without what was generated
    with_corpus = scaling.amounts(config, 60, 40, 120.5, 8, 5000)  # and 3,000 of its passages
    assert with_corpus["annotate"] == 4100 and with_corpus["distill: student"] == (4000 + 800) * 2
    assert (with_corpus["harvest: passages"], with_corpus["harvest: candidates"], with_corpus["generate"]) == (120.5, 12000, 1000)
    small = scaling.amounts(config.model_copy(update={"generate": config.generate.model_copy(update={"rows": 100})}), 60, 40, 0, 8, 5000)
    assert scaling.ratios(found, small)["generate"] == 10 and scaling.ratios(found, small)["teach: prompt"] == 1
    assert scaling.ratios({"a": 3}, {"a": 0}) == {"a": 1}
