"""Requests that come together: one pass of the model for many, and each gets the answer that it would get alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from making.serving_local import Replica, close_to, named, replica, rows_of, scores
from making.tiny_run import LABELS, TEXTS, WORDS, make_run

from retrikt_ray.index.mixture import Mixture
from retrikt_ray.predictor import Predictor
from retrikt_ray.task.texts import Text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "single"))


@pytest.fixture(scope="module")
def single(run: str) -> Iterator[Replica]:
    with replica(run) as opened:
        yield opened


def test_requests_are_answered_in_batches_of_the_size_that_was_set(run: str) -> None:
    with replica(run, max_batch=4) as opened:
        with mock.patch.object(opened.predictor, "answer", wraps=opened.predictor.answer) as answer:
            bodies: list[Any] = [("predict", {"inputs": [text] * (1 + i % 2)}) for i, text in enumerate(TEXTS)]
            assert {a.status_code for a in opened.together(bodies)} == {200}
    assert [len(call.args[0]) for call in answer.call_args_list] == [6, 6, 6]  # four requests, of one text and two in turn


def test_evidence_is_looked_up_where_a_request_of_the_batch_shows_it(run: str) -> None:
    with replica(run, max_batch=2) as opened:
        with mock.patch.object(opened.predictor, "answer", wraps=opened.predictor.answer) as answer:
            for routes in (("predict", "predict"), ("predict", "explain")):
                answers = opened.together([(route, {"inputs": "a fine film"}) for route in routes])
                assert {a.status_code for a in answers} == {200}
    assert [call.args[1] for call in answer.call_args_list] == [False, True]


def test_searches_that_ask_alike_are_one_pass(run: str) -> None:
    with replica(run, max_batch=5) as opened:
        with mock.patch.object(opened.predictor, "retrieve", wraps=opened.predictor.retrieve) as retrieve:
            asked: list[Any] = [{"k": 2}, {"k": 3}, {"k": 2, "mode": "dense"}, {"k": 2, "label": "negative"}, {"k": 2, "mode": "lexical"}]
            answers = opened.together([("retrieve", {"inputs": TEXTS[i], **more}) for i, more in enumerate(asked)])
    assert [(len(call.args[0]), call.args[1], call.kwargs["label"]) for call in retrieve.call_args_list] == [
        (2, 2, None),
        (1, 3, None),
        (1, 2, "negative"),
    ]
    assert [a.json()[0]["id"] for a in answers[:3]] == ["train-000000", "train-000001", "train-000002"]


def test_bad_filter_is_refused_and_the_good_requests_beside_it_are_answered(run: str) -> None:
    bad: list[Any] = [{"label": "warm"}, {"source": "web"}, {"label": "negative", "source": "web"}, {"mode": "hybrid", "label": "warm"}]
    good: list[Any] = [{"k": 1}, {"k": 2}, {"label": "negative"}, {"mode": "lexical"}, {"mode": "hybrid", "source": "task"}, {"k": 2}]
    bodies: list[Any] = [("retrieve", {"inputs": [TEXTS[i], TEXTS[-1 - i]], **more}) for i, more in enumerate([*bad, *good])]
    with replica(run, max_batch=len(bodies)) as opened:
        answers = opened.together(bodies)
        alone = [opened.post(*body).json() for body in bodies[4:]]
    assert [a.status_code for a in answers] == [422] * 4 + [200] * 6
    label = "label: found 'warm'; the labels of tiny are negative, positive"
    source = "source: found 'web'; the sources of the store are generated, task"
    assert [a.json()["error"] for a in answers[:4]] == [label, source, source, label]
    assert {a.json()["expected"] for a in answers[:4]} == {"a label of the task, a source of the store"}
    assert [a.json() for a in answers[4:]] == close_to(alone)
    assert [[len(rows) for rows in answers[i].json()] for i in (4, 5, 9)] == [[1, 1], [2, 2], [2, 2]]
    assert answers[5].json()[0][0]["text"] == TEXTS[5] and answers[9].json()[1][0]["text"] == TEXTS[-10]


def test_concurrent_requests_each_get_their_own_answer(run: str, single: Replica) -> None:
    predictor = Predictor.open(run)
    texts = [" ".join(WORDS[(i * s) % len(WORDS)] for s in (1, 2, 3, 5)) for i in range(1, 61)]

    def body(i: int) -> tuple[str, Any]:
        both = [texts[i], texts[i - 1]]
        return [
            ("retrieve", {"inputs": texts[i], "k": 1 + i % 5}),
            ("predict", {"inputs": both}),
            ("retrieve", {"inputs": both, "k": 3, "mode": "hybrid", "label": LABELS[i % 8 // 4]}),
            ("explain", {"inputs": texts[i]}),
        ][i % 4]

    for i, answer in enumerate(single.together([body(i) for i in range(60)])):
        queries: list[Text] = [(texts[i], None), (texts[i - 1], None)]
        if i % 4 == 0:
            assert [answer.json()] == close_to(rows_of(predictor, predictor.retrieve(queries[:1], 1 + i % 5), "similarity"))
        elif i % 4 == 1:
            assert [scores(row) for row in answer.json()] == close_to([named(row) for row in predictor.answer(queries).answers])
        elif i % 4 == 2:
            where = {"label": LABELS[i % 8 // 4]}
            near = rows_of(predictor, predictor.retrieve(queries, 3, **where), "similarity")
            words = rows_of(predictor, predictor.knowledge.view.search_words(queries, 3, **where), "bm25")
            assert answer.json() == close_to([{"dense": near[j], "lexical": words[j]} for j in range(2)])
        else:
            want = predictor.predict(texts[i])
            assert scores(answer.json()["prediction"]) == close_to(named(want.answers[0]))
            assert [r["id"] for r in answer.json()["neighbours"]] == [n.id for n in want.neighbours[0]]


def test_overload_is_refused_and_what_was_taken_is_answered(run: str) -> None:
    with replica(run, max_batch=1, max_queued=0, max_texts=256) as opened:
        heavy = ("retrieve", {"inputs": ["a warm film"] * 256, "k": 12})
        answers = opened.together([heavy] * 12)
        assert [a.status_code for a in answers] == [200] * 2 + [503] * 10
        assert [len(rows) for rows in answers[1].json()] == [12] * 256
        assert answers[-1].headers["retry-after"] == "1"
        assert answers[-1].json() == {
            "error": "2 requests are waiting already",
            "code": "overloaded",
            "expected": "the same request a second later",
        }
        assert opened.post("retrieve", {"inputs": "a film"}).status_code == 200


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fault_in_a_batch_is_told_to_each_and_the_next_is_answered(run: str, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """tau 0 makes every vote, and so every prediction, NaN, which JSON cannot say."""
    broken = str(make_run(tmp_path / "broken", mixture=Mixture(0.5, 0.5, 0.0, 0.0, 8, 0.0, 8, 1.0)))
    with replica(broken, max_batch=3) as opened:
        answers = opened.together([("predict", {"inputs": "a film"}), ("explain", {"inputs": "a film"}), ("predict", {"inputs": ["a"]})])
        assert [a.status_code for a in answers] == [500] * 3
        codes = {a.json()["error_id"] for a in answers}
        assert len(codes) == 3 and all(re.search(f"error {code} in POST", log.text) for code in codes)
        assert "ValueError" in log.text
        assert opened.post("retrieve", {"inputs": "a film"}).status_code == 200
    assert opened.endpoint.active == 0
