"""The tables of a bench: means, intervals and paired differences, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from retrikt_ray.bench.table import by_run, differences, markdown, markdown_all, shown


def cell(task: str, seed: int, scores: dict[str, float], protocol: str = "generated", **numbers: int) -> dict[str, Any]:
    return {"task": task, "seed": seed, "protocol": protocol, "scores": scores, "numbers": dict.fromkeys(scores, 1000) | numbers}


CELLS = [
    cell("trec", 0, {"retrikt": 0.90, "teacher": 0.95}, teacher=5_000_000),
    cell("trec", 0, {"tfidf": 0.80}),  # another group of the same run
    cell("trec", 1, {"retrikt": 0.80, "teacher": 0.93}, teacher=5_000_000),
    cell("trec", 1, {"tfidf": 0.76}, tfidf=2001),
    cell("cola", 0, {"retrikt": 0.30, "teacher": 0.50}, teacher=5_000_000),
    cell("trec", 0, {"retrikt": 0.10}, "unlabelled"),
]


def test_scores_by_run_of_one_protocol() -> None:
    scores = by_run(CELLS, "generated")
    assert scores[("trec", 0)] == pytest.approx({"retrikt": 90, "teacher": 95, "tfidf": 80}) and len(scores) == 3
    assert by_run(CELLS, "unlabelled") == {("trec", 0): {"retrikt": pytest.approx(10)}}


def test_differences_are_paired_by_task_and_seed() -> None:
    scores = by_run(CELLS, "generated")
    assert differences(scores, "teacher") == pytest.approx([-20, -5, -13])  # cola, trec 0, trec 1
    assert differences(scores, "tfidf") == pytest.approx([10, 4])  # where both were measured
    assert differences(scores, "nobody") == []


def test_shown() -> None:
    assert shown(12.345, 0.678) == "12.3 ± 0.7" and shown(12.345, math.nan) == "12.3"


def test_markdown() -> None:
    """Of the values 90 and 80 the interval is 12.706 * 5 = 63.5; of the gaps -5, -13 and -20 it is 4.303 * 7.506 / sqrt(3) = 18.6."""
    assert markdown(CELLS, "generated").splitlines() == [
        "| system | trec | cola | mean | retrikt less this | numbers |",
        "|---|---|---|---|---|---|",
        "| retrikt | 85.0 ± 63.5 | 30.0 | 57.5 |  | 1,000 |",
        "| teacher | 94.0 ± 12.7 | 50.0 | 72.0 | -12.7 ± 18.6 | 5,000,000 |",
        "| tfidf | 78.0 ± 25.4 | - | - | 7.0 ± 38.1 | 1,500 |",  # not measured on all tasks: no mean
    ]


def test_markdown_all() -> None:
    text = markdown_all(CELLS)
    assert "over the seeds 0, 1;" in text.splitlines()[0]
    assert [line for line in text.splitlines() if line.startswith("#")] == ["### generated", "### unlabelled"]
    assert markdown(CELLS, "unlabelled") in text and "| retrikt | 10.0 | 10.0 |  | 1,000 |" in text
