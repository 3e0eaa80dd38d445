"""The plots of a bench: which there are, and where their points are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from retrikt_ray.bench.groups import GROUPS
from retrikt_ray.bench.plots import LEFT, QUESTIONS, WIDTH, intervals, plots


def test_a_plot_for_each_question_that_was_measured() -> None:
    def cell(scores: dict[str, float], protocol: str) -> dict[str, object]:
        return {"task": "trec", "seed": 0, "protocol": protocol, "scores": scores, "numbers": dict.fromkeys(scores, 1)}

    found = plots(
        [cell({"retrikt": 0.9, "teacher": 0.95, "tfidf_store": 0.8}, "generated"), cell({"retrikt": 0.9, "no_dense": 0.9}, "unlabelled")]
    )
    assert set(found) == {"generated-cheaper", "generated-teacher", "unlabelled-voices"}
    assert "tfidf_store" in found["generated-cheaper"] and "teacher<" not in found["generated-cheaper"]
    for text in found.values():
        ElementTree.fromstring(text)


def test_every_ablation_answers_a_question() -> None:
    begins = tuple(b for _, some in QUESTIONS.values() for b in some)
    assert [name for name in GROUPS if not name.startswith(begins)] == ["retrikt", "labels", "small"]  # whose systems do, one by one


def test_where_points_are() -> None:
    """Two runs, 1 and 3 points ahead: mean 2, and an interval of 12.706 to either side. One run has no interval."""
    text = intervals("<ahead>", {"a": [1.0, 3.0], "b": [-4.0]})
    assert "&lt;ahead&gt;" in text and "+2.0" in text and "-4.0" in text
    low, high = 2 - 12.706, 2 + 12.706

    def x(value: float) -> float:
        return LEFT + (value - low) * (WIDTH - LEFT - 90) / (high - low)

    means = [float(v) for v in re.findall(r'<circle cx="([\d.]+)" cy="\d+" r="4"', text)]
    runs = [float(v) for v in re.findall(r'<circle cx="([\d.]+)" cy="\d+" r="2"', text)]
    lines = [tuple(map(float, v)) for v in re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', text)]
    assert means == pytest.approx([x(2), x(-4)], abs=0.2) and runs == pytest.approx([x(1), x(3), x(-4)], abs=0.2)
    assert lines[0] == pytest.approx((x(0), x(0)), abs=0.2)
    assert lines[1] == pytest.approx((x(low), x(high)), abs=0.2) and lines[2] == pytest.approx((x(-4), x(-4)), abs=0.2)
