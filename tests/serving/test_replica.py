"""A replica over tiny runs, in this process: its answers are the Predictor's, to the last digit where a text is asked alone."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from making.serving_local import Replica, close_to, named, replica, rows_of, scores
from making.tiny_run import LABELS, TEXTS, make_run

from retrikt_ray import __version__
from retrikt_ray.index.spread import MissingShards
from retrikt_ray.predictor import Predictor
from retrikt_ray.task.texts import Text

PAIR = {"text": "a warm film", "text_pair": "never dull"}
WEIGHTS = {"student": 0.5, "dense": 0.3, "lexical": 0.2, "ngrams": 0.3}  # of a tiny run
LIMITS = {"max_texts": 300, "max_text_chars": 200, "max_body_bytes": 20_000}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "single"))


@pytest.fixture(scope="module")
def single(run: str) -> Iterator[Replica]:
    with replica(run, **LIMITS) as opened:
        yield opened


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with replica(str(make_run(tmp_path_factory.mktemp("runs") / "pair", pair=True, regression=True))) as opened:
        yield opened


@pytest.fixture(scope="module")
def predictor(run: str) -> Predictor:
    return Predictor.open(run)


def query(*texts: str) -> list[Text]:
    return [(text, None) for text in texts]


def expected_scores(predictor: Predictor, text: str) -> dict[str, float]:
    return named(predictor.predict(text).answers[0])


# predict and explain


def test_predict_one_text_is_a_list_of_scores_best_first(single: Replica, predictor: Predictor) -> None:
    answer = single.post("predict", {"inputs": "a fine film"}).json()
    assert scores(answer) == expected_scores(predictor, "a fine film")
    assert answer[0]["score"] > answer[1]["score"]
    assert sum(a["score"] for a in answer) == pytest.approx(1, abs=1e-5)


def test_predict_list_keeps_order_and_top_k_cuts(single: Replica, predictor: Predictor) -> None:
    texts = ["so weak", "a fine film", "never cold"]
    answer = single.post("predict", {"inputs": [texts[0], {"text": texts[1]}, {"text": texts[2], "text_pair": None}]}).json()
    assert [scores(row) for row in answer] == [named(row) for row in predictor.predict(texts).answers]
    assert answer == close_to([single.post("predict", {"inputs": text}).json() for text in texts])
    assert [row[0]["label"] for row in answer] == predictor.predict(texts).labels
    cut = single.post("predict", {"inputs": texts, "top_k": 1}).json()
    assert cut == [row[:1] for row in answer]


def voted(rows: list[dict[str, Any]], by: str, tau: float) -> list[float]:
    """The vote of rows as the API shows them, in plain loops; a row's teacher gives its label `score` and the other the rest."""
    weights = [math.exp((r[by] - rows[0][by]) / tau) for r in rows]
    positive = [r["score"] if r["label"] == "positive" else 1 - r["score"] for r in rows]
    share = sum(w * p for w, p in zip(weights, positive, strict=True)) / sum(weights)
    return [1 - share, share]


def test_explain_shows_both_sides_and_what_they_voted(single: Replica, predictor: Predictor) -> None:
    answer = single.post("explain", {"inputs": "the cast was cold"}).json()
    found = predictor.predict("the cast was cold")
    assert found.dense is not None and found.lexical is not None
    assert set(answer) == {"prediction", "told", "student", "votes", "without", "neighbours", "lexical_neighbours", "ngrams", "mixture"}
    assert scores(answer["prediction"]) == named(found.answers[0])
    assert scores(answer["student"]) == named(found.student[0])
    assert [bare(answer["neighbours"])] == rows_of(predictor, found.dense, "similarity")
    assert [bare(answer["lexical_neighbours"])] == rows_of(predictor, found.lexical, "bm25")
    assert (len(answer["neighbours"]), len(answer["lexical_neighbours"])) == (8, 4)
    assert answer["mixture"] == WEIGHTS | {"k": 8, "tau": 0.1, "lexical_k": 4, "lexical_tau": 1.0, "prior": []}
    assert set(answer["votes"]) == {"dense", "lexical", "ngrams"}
    assert scores(answer["votes"]["dense"]) == close_to(named(voted(answer["neighbours"], "similarity", 0.1)))
    assert scores(answer["votes"]["lexical"]) == close_to(named(voted(answer["lexical_neighbours"], "bm25", 1.0)))
    assert scores(answer["votes"]["ngrams"]) == named(predictor.knowledge.view.ngrams.answers(query("the cast was cold"))[0][0])
    for side in (answer["prediction"], answer["student"], *answer["votes"].values()):
        assert side[0]["score"] >= side[1]["score"]
    assert scores(answer["prediction"]) == close_to(pooled(answer))  # what is shown is what was mixed


def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the answer would be without them."""
    return [{k: v for k, v in row.items() if k != "without"} for row in rows]


def pooled(answer: dict[str, Any]) -> dict[str, float]:
    """The product of what is shown, each to the power of its weight; the student stands in for what found nothing."""
    said = {name: scores(answer["votes"].get(name) or answer["student"]) for name in WEIGHTS}
    products = [math.prod((0.98 * said[name][label] + 0.01) ** weight for name, weight in WEIGHTS.items()) for label in LABELS]
    return named([p / sum(products) for p in products])


def test_explain_where_nothing_was_found(single: Replica) -> None:
    strange, plain = single.post("explain", {"inputs": ["unheard of", "a film"]}).json()
    assert (strange["votes"]["lexical"], strange["lexical_neighbours"]) == (None, [])
    assert (strange["votes"]["ngrams"], strange["ngrams"]) == (None, [])
    assert plain["votes"]["lexical"] is not None and len(plain["lexical_neighbours"]) == 4
    assert plain["votes"]["ngrams"] is not None and {"a", "film"} <= {s["ngram"] for s in plain["ngrams"]}
    for answer in (strange, plain):
        assert scores(answer["prediction"]) == close_to(pooled(answer))


def test_explain_names_the_ngrams_of_each_text_that_say_most(single: Replica, predictor: Predictor) -> None:
    texts = ["the plot was warm", "unheard of", "a weak plot"]
    answers, want = single.post("explain", {"inputs": texts}).json(), predictor.predict(texts).ngrams
    assert [a["ngrams"] for a in answers] == [
        [{"ngram": s.ngram, "weight": pytest.approx(s.weight, abs=1e-9)} for s in some] for some in want
    ]
    # Rows 1 and 4, both positive, have "warm", 8 and 9, both negative, "weak".
    for answer, ngram, label in ((answers[0], "warm", "positive"), (answers[2], "weak", "negative")):
        said = {s["ngram"]: s["weight"] for s in answer["ngrams"]}
        assert (said[ngram] > 0) == (answer["prediction"][0]["label"] == label)
        assert abs(said[ngram]) == max(map(abs, said.values()))


def test_page_shows_every_voice_under_the_names_that_explain_gives_them(single: Replica) -> None:
    page, answer = single.get("/").text, single.post("explain", {"inputs": "a film"}).json()
    sides = re.findall(r'name: "(\w+)", rows: "(\w+)".* row\.(\w+)\.toFixed', page)
    assert sides == [("dense", "neighbours", "similarity"), ("lexical", "lexical_neighbours", "bm25")]
    for name, rows, score in sides:
        assert {name} <= answer["votes"].keys() & answer["mixture"].keys()
        assert isinstance(answer[rows][0][score], float)
        assert {f'id="{name}-{part}"' for part in ("vote", "rows", "rest")} <= set(re.findall(r'id="[\w-]+"', page))
    assert re.findall(r'MEMORY = \{ name: "(\w+)"', page) == ["ngrams"] and {"ngrams"} <= answer["votes"].keys() & answer["mixture"].keys()
    assert set(re.findall(r"spoken\.(\w+)", page)) == answer["ngrams"][0].keys()
    assert {rows for _, rows, _ in sides} | set(re.findall(r"found\.(\w+)", page)) <= answer.keys()
    assert set(re.findall(r"info\.(\w+)", page)) <= single.get("/info").json().keys()
    # Whatever the script asks for by its id is there.
    ids = set(re.findall(r' id="([\w-]+)"', page))
    assert set(re.findall(r'\$\("([\w-]+)"\)', page)) | {f"ngrams-{part}" for part in ("vote", "for", "against")} <= ids


def test_regression_of_a_pair_is_label_0(pairs: Replica) -> None:
    value = float(pairs.predictor.predict(("a warm film", "never dull")).answers[0, 0])
    assert pairs.post("predict", {"inputs": PAIR}).json() == [{"label": "LABEL_0", "score": value}]
    assert pairs.post("predict", {"inputs": [PAIR, PAIR]}).json() == close_to([[{"label": "LABEL_0", "score": value}]] * 2)
    first = {"text": TEXTS[0], "text_pair": TEXTS[-1]}
    row = pairs.post("retrieve", {"inputs": first, "k": 1}).json()[0]
    assert (row["id"], row["text_pair"], row["label"], row["score"]) == ("train-000000", TEXTS[-1], "4.75", pytest.approx(4.75))
    # Both texts of a row are searched as one: rows 0 and 11 hold the same words.
    rows = pairs.post("retrieve", {"inputs": first, "k": 2, "mode": "lexical"}).json()
    assert [r["id"] for r in rows] == ["train-000000", "train-000011"]
    assert rows[0]["bm25"] == rows[1]["bm25"]
    refused = pairs.post("retrieve", {"inputs": first, "label": "positive"})
    assert refused.status_code == 422
    assert refused.json()["error"] == "label: found 'positive'; the labels of tiny are none, it is a regression"


def test_explain_in_regression(pairs: Replica) -> None:
    answer = pairs.post("explain", {"inputs": PAIR}).json()
    found = pairs.predictor.predict(("a warm film", "never dull"))
    assert len({r["bm25"] for r in answer["lexical_neighbours"]}) > 1  # else tau would not matter
    values = {"student": float(found.student[0, 0])}
    for side, rows, by, tau in (("dense", "neighbours", "similarity", 0.1), ("lexical", "lexical_neighbours", "bm25", 1.0)):
        weights = [math.exp((r[by] - answer[rows][0][by]) / tau) for r in answer[rows]]
        values[side] = sum(w * r["score"] for w, r in zip(weights, answer[rows], strict=True)) / sum(weights)
        assert answer["votes"][side] == [{"label": "LABEL_0", "score": pytest.approx(values[side], abs=1e-5)}]
    assert answer["student"] == [{"label": "LABEL_0", "score": values["student"]}]
    values["ngrams"] = float(found.voices["ngrams"][0][0, 0])
    assert answer["votes"]["ngrams"] == [{"label": "LABEL_0", "score": values["ngrams"]}]
    mixed = sum(weight * values[name] for name, weight in WEIGHTS.items())
    assert answer["prediction"] == [{"label": "LABEL_0", "score": pytest.approx(mixed, abs=1e-5)}]


# retrieve


def test_retrieve_gives_the_nearest_rows(single: Replica, predictor: Predictor) -> None:
    answer = single.post("retrieve", {"inputs": "a dull film", "k": 3}).json()
    assert [answer] == rows_of(predictor, predictor.retrieve(query("a dull film"), 3), "similarity")
    assert answer[0] == {  # position 6, the first negative one, whose teacher says 0.95
        "id": "train-000006",
        "text": "a dull film",
        "text_pair": None,
        "source": "task",
        "label": "negative",
        "score": pytest.approx(0.95, abs=1e-6),
        "similarity": pytest.approx(1, abs=1e-5),
    }


def test_retrieve_modes(single: Replica, predictor: Predictor) -> None:
    texts = ["never dull", "so cold"]
    dense = rows_of(predictor, predictor.retrieve(query(*texts), 4), "similarity")
    lexical = rows_of(predictor, predictor.knowledge.view.search_words(query(*texts), 4), "bm25")
    # "never" is in rows 5 and 11, "dull" in 5 and 6, "cold" in 7 and 10; row 7 is the shorter one. "so" is in none.
    assert [[r["id"] for r in rows] for rows in lexical] == [
        ["train-000005", "train-000011", "train-000006"],
        ["train-000007", "train-000010"],
    ]
    hybrid = [{"dense": d, "lexical": x} for d, x in zip(dense, lexical, strict=True)]
    assert single.post("retrieve", {"inputs": texts, "k": 4}).json() == dense
    for mode, want in (("dense", dense), ("lexical", lexical), ("hybrid", hybrid)):
        assert single.post("retrieve", {"inputs": texts, "k": 4, "mode": mode}).json() == want
        assert single.post("retrieve", {"inputs": texts[1], "k": 4, "mode": mode}).json() == close_to(want[1])


def test_retrieve_of_a_text_that_shares_no_word_finds_nothing_by_words(single: Replica) -> None:
    assert single.post("retrieve", {"inputs": "unheard of", "mode": "lexical"}).json() == []
    both = single.post("retrieve", {"inputs": ["unheard of"], "mode": "hybrid", "k": 2}).json()[0]
    assert (len(both["dense"]), both["lexical"]) == (2, [])


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({"label": "negative"}, range(6, 12)),
        ({"label": "positive"}, range(6)),
        ({"source": "generated"}, range(1, 12, 2)),
        ({"label": "negative", "source": "task"}, range(6, 12, 2)),
        ({"label": None, "source": None}, range(12)),
    ],
)
def test_retrieve_filters(single: Replica, predictor: Predictor, where: dict[str, Any], rows: range) -> None:
    text = "a very cold film"
    ids = [f"train-{i:06d}" for i in rows]
    dense = single.post("retrieve", {"inputs": text, "k": 100, **where}).json()
    assert sorted(r["id"] for r in dense) == ids
    assert [dense] == rows_of(predictor, predictor.retrieve(query(text), 12, **where), "similarity")
    lexical = single.post("retrieve", {"inputs": text, "k": 100, "mode": "lexical", **where}).json()
    assert sorted(r["id"] for r in lexical) == [i for i in ids if set(text.split()) & set(TEXTS[int(i[-2:])].split())]
    assert [lexical] == rows_of(predictor, predictor.knowledge.view.search_words(query(text), 12, **where), "bm25")
    assert single.post("retrieve", {"inputs": text, "k": 100, "mode": "hybrid", **where}).json() == {"dense": dense, "lexical": lexical}
    assert single.post("retrieve", {"inputs": text, "k": 2, **where}).json() == dense[:2]  # filtered before it is cut, not after


@pytest.mark.parametrize("name", ["label", "source"])
@pytest.mark.parametrize("value", ["", "warm", "\ud800", "x" * 1000])
def test_a_filter_that_does_not_exist_is_refused(single: Replica, name: str, value: str) -> None:
    answer = single.post("retrieve", {"inputs": ["a"], name: value})
    known = {"label": "the labels of tiny are negative, positive", "source": "the sources of the store are generated, task"}[name]
    assert answer.status_code == 422
    assert answer.json() == {
        "error": f"{name}: found {value!r}; {known}",
        "code": "invalid",
        "expected": "a label of the task, a source of the store",
    }


def test_retrieve_more_than_there_are_gives_all(single: Replica) -> None:
    many = single.post("retrieve", {"inputs": ["a film", "so cold"], "k": 100}).json()
    assert [sorted(r["id"] for r in rows) for rows in many] == [sorted(f"train-{i:06d}" for i in range(12))] * 2
    assert len(single.post("retrieve", {"inputs": "a film"}).json()) == 8


@pytest.mark.parametrize("text", ["\u200b", "\x01", "[PAD] [PAD]", "[UNK]", "\ufeff", "\ufffe", "\U0001f993" * 200])
def test_strange_texts_are_answered(single: Replica, text: str) -> None:
    for route in ("predict", "retrieve", "explain"):
        assert single.post(route, {"inputs": text}).status_code == 200


MILLION = "film " * 1_000_000


def test_a_text_of_a_million_words_is_refused_or_cut(run: str) -> None:
    text = MILLION
    with replica(run, max_body_bytes=10**7) as opened:
        assert opened.post("predict", {"inputs": text}).status_code == 413
        cut = opened.post("predict", {"inputs": text, "truncate": True})
        assert (cut.status_code, cut.json()) == (200, opened.post("predict", {"inputs": text[:20_000]}).json())


@pytest.mark.slow
def test_a_text_of_a_million_words_is_answered_where_that_is_allowed(run: str) -> None:
    with replica(run, max_body_bytes=10**7, max_text_chars=10**7) as opened:
        assert opened.post("predict", {"inputs": MILLION}).status_code == 200


def test_info(single: Replica, predictor: Predictor) -> None:
    info = single.get("/info").json()
    assert info == predictor.info() | {"refused": None, "version": __version__, "limits": LIMITS | {"deadline_s": 10}}
    assert info["store"] == {"rows": 12, "version": 0}


# whether it answers


def test_a_replica_is_well_while_it_answers(run: str) -> None:
    with replica(run, deadline_s=0.3) as one:
        unlike = one.endpoint.metrics.unlike._value.get()
        one.loop.run(one.endpoint.answers())
        assert one.endpoint.metrics.unlike._value.get() == unlike  # the question is no drift
        free = threading.Event()
        one.endpoint.opened.worker.submit(free.wait)  # type: ignore[union-attr]
        try:
            with pytest.raises(TimeoutError):
                one.loop.run(one.endpoint.answers())
        finally:
            free.set()
        one.loop.run(one.endpoint.answers())


def test_a_damaged_run_is_not_the_replicas_fault(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with replica(str(folder)) as one:
        one.predictor.knowledge.add({"text": "one more", "label": "negative"})
        path = tmp_path / "run" / "knowledge" / "manifest.json"
        path.write_bytes(path.read_bytes()[:-3] + b"???")
        assert one.post("predict", {"inputs": "a film"}).status_code >= 500
        one.loop.run(one.endpoint.answers())


def test_missing_shards_are_told(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with replica(run) as one:
        searcher = one.predictor.knowledge.view.base.searcher
        plain = searcher.search

        def short(*asked: Any) -> Any:
            searcher.missing = 2
            return plain(*asked)

        def refused(*asked: Any) -> Any:
            raise MissingShards("1 of 3 groups of shards have not answered in 1 s")

        whole = one.post("predict", {"inputs": "a film"})
        assert "x-knowledge-missing" not in whole.headers
        monkeypatch.setattr(searcher, "search", short)
        assert one.post("predict", {"inputs": "a film"}).headers["x-knowledge-missing"] == "2"
        monkeypatch.setattr(searcher, "search", refused)
        answer = one.post("predict", {"inputs": "a film"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["error"] == "1 of 3 groups of shards have not answered in 1 s"
