"""Each piece of advice comes from a rule: given where its condition holds, and not where it just does not."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from retrikt_ray.report.advice import RULES, advise

FINE: dict[str, Any] = {
    "labels": ["a", "b", "c", "d"],
    "rows": {"train": 256, "validation": 200, "test": 900, "unlabelled": 1000},
    "systems": {"tfidf_labels": {}},
    "paired": {
        "student_labels": {"difference": 0.05, "ci95": 0.02},
        "student_kd_store": {"difference": 0.02, "ci95": 0.01},
        "tfidf_store": {"difference": 0.03, "ci95": 0.02},
        "tfidf_labels": {"difference": 0.09, "ci95": 0.03},
    },
    "teacher_over_tfidf": {"difference": 0.1, "ci95": 0.04},
    "unseen": {"rows": 800, "gold": 200, "gain": 0.02, "ci95": 0.01},
    "learnt": {"student": {"sources": [], "loss": {"all": 0.5}}, "ngrams": {"sources": []}},
    "mixture": {"student": 1.0, "dense": 0.0, "lexical": 0.0, "ngrams": 0.5},
    "store": {
        "generated": 1000,
        "by_source": {"task": 256, "generated": 900},
        "rejected": {"empty": 10, "near_duplicate": 60, "too_short": 30},
        "repeated": 0.06,
        "agreement": 0.7,
        "begin_with_a_letter": {"generated": 0.97, "task": 1.0},
        "off_task": {"task": 0.05, "unlabelled": 0.4, "generated": 0.6},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    report = deepcopy(FINE)
    *parents, leaf = path.split("/")
    part = report
    for key in parents:
        part = part[key]
    part[leaf] = value
    return report


def rules(report: dict[str, Any]) -> list[str]:
    return [advice["rule"] for advice in advise(report)]


def test_a_good_run_needs_no_advice() -> None:
    assert rules(FINE) == []


@pytest.mark.parametrize(
    ("rule", "path", "value", "just_not"),
    [
        ("teacher_no_better", "teacher_over_tfidf", {"difference": 0.03, "ci95": 0.04}, {"difference": 0.05, "ci95": 0.04}),
        ("store_adds_nothing", "paired/student_labels", {"difference": 0.01, "ci95": 0.02}, {"difference": 0.021, "ci95": 0.02}),
        ("retrieval_adds_nothing", "unseen", {"rows": 800, "gain": 0.01, "ci95": 0.01}, {"rows": 800, "gain": 0.011, "ci95": 0.01}),
        ("cheaper_is_better", "paired/tfidf_store", {"difference": -0.03, "ci95": 0.02}, {"difference": -0.01, "ci95": 0.02}),
        ("generated_off_label", "store/agreement", 0.3, 0.38),  # 4 classes: chance 0.25, wanted 0.375
        ("generated_off_task", "store/off_task", {"task": 0.05, "generated": 0.71}, {"task": 0.05, "generated": 0.7}),
        ("generated_begin_otherwise", "store/begin_with_a_letter", {"generated": 0.8, "task": 1.0}, {"generated": 0.96, "task": 1.0}),
        ("generated_lost", "store/by_source", {"task": 256, "generated": 499}, {"task": 256, "generated": 500}),
        ("generated_lost", "store/by_source", {"task": 256}, {"task": 256, "generated": 500}),
        ("generator_repeats_itself", "store/repeated", 0.11, 0.1),
        ("too_few_rows", "rows/validation", 99, 100),
    ],
)
def test_a_rule_speaks_where_its_condition_holds(rule: str, path: str, value: Any, just_not: Any) -> None:
    assert rules(changed(path, value)) == [rule]
    assert rules(changed(path, just_not)) == []


def test_what_a_report_lacks_is_not_advised_on() -> None:
    bare = FINE | {"paired": {}, "teacher_over_tfidf": None, "store": {}, "labels": []}
    assert rules(bare) == []
    assert (
        rules(FINE | {"store": {"agreement": None, "begin_with_a_letter": {"task": 1.0}, "off_task": {"task": 0.05}, "repeated": None}})
        == []
    )


def test_advice_names_what_was_measured_and_what_to_change() -> None:
    (advice,) = advise(changed("teacher_over_tfidf", {"difference": -0.012, "ci95": 0.04}))
    assert "-1.2 ± 4.0 points" in advice["text"] and "256 labelled rows" in advice["text"] and "teach.annotator" in advice["text"]
    behind = changed("paired/tfidf_store", {"difference": -0.05, "ci95": 0.02})
    behind["paired"]["student_labels"] = {"difference": -0.03, "ci95": 0.02}
    texts = {a["rule"]: a["text"] for a in advise(behind)}
    assert texts["cheaper_is_better"].startswith("tfidf_store is 5.0 points ahead")  # the one furthest ahead
    assert next(iter(texts)) == "cheaper_is_better"  # and first


def test_advice_names_the_commonest_reason_of_rejection() -> None:
    lost = changed("store/by_source", {"task": 256})
    lost["store"]["rejected"] = {"too_short": 10, "empty": 990}
    (advice,) = advise(lost)
    assert advice["text"].startswith("Only 0 of 1,000 generated texts became rows; most were rejected as empty (990).")


def test_what_was_generated_and_not_learnt_from_is_told() -> None:
    own = ["task", "unlabelled"]
    learnt = {"student": {"sources": own, "loss": {"all": 0.5551, "task and unlabelled": 0.5069}}, "ngrams": {"sources": own}}
    (advice,) = advise(changed("learnt", learnt))
    assert "your 1,000 unlabelled texts" in advice["text"] and "0.507 without them, 0.555 with them" in advice["text"]
    for part in ("student", "ngrams"):  # the other learns from them
        assert rules(changed("learnt", learnt | {part: FINE["learnt"][part]})) == []


def test_the_student_alone_is_offered_where_others_speak() -> None:
    level = changed("unseen", {"rows": 1200, "gain": -0.002, "ci95": 0.004})
    (advice,) = advise(level)
    assert "On 1,200 rows" in advice["text"] and "-0.2 ± 0.4 points" in advice["text"] and "`index.voices=[student]`" in advice["text"]
    level["mixture"]["ngrams"] = 0.0
    (advice,) = advise(level)
    assert "its student alone here" in advice["text"] and "index.voices" not in advice["text"]


def test_every_rule_is_tried_here() -> None:
    assert {rule.__name__ for rule in RULES} == {
        "teacher_no_better",
        "store_adds_nothing",
        "others_not_learnt",
        "retrieval_adds_nothing",
        "cheaper_is_better",
        "generated_off_label",
        "generated_off_task",
        "generated_begin_otherwise",
        "generated_lost",
        "generator_repeats_itself",
        "too_few_rows",
    }
