"""Serving, over real HTTP: four tiny runs behind one Serve on a free loopback port. Expected values come from Predictor directly."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")

import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from making.tiny_run import LABELS, TEXTS, WORDS, make_run
from pydantic import BaseModel
from ray import serve
from ray.serve.schema import ServeDeploySchema

from retrikt_ray import __version__
from retrikt_ray.knowledge.compact import compact
from retrikt_ray.knowledge.knowledge import Hits, Knowledge
from retrikt_ray.predictor import Mixture, Predictor
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.app import ServeArgs, build_app, check_port, parse_args, serve_run
from retrikt_ray.serving.wire import read_texts

ROOT = Path(__file__).parents[2]
LIMITS = {"max_texts": 5, "max_text_chars": 200, "max_body_bytes": 4000}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """The running server: its URL, the runs' Predictors opened here, and where replicas log."""

    url: str
    single: Predictor
    pair: Predictor
    edited: Folder  # a run that tests edit; each leaves the rows as they were
    logs: Path

    def post(self, route: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{route}", json=body, timeout=30, **more)

    def logged(self, app: str, code: str) -> str:
        """The log of an app's replicas, once it has this error id: another process writes it."""
        for _ in range(50):
            text = "".join(p.read_text() for p in self.logs.glob(f"replica_{app}_*"))
            if code in text:
                break
            time.sleep(0.1)
        return text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("runs")
    single = str(make_run(folder / "single"))
    pair = str(make_run(folder / "pair", pair=True, regression=True))
    broken = str(make_run(folder / "broken", mixture=Mixture(0.5, 0.5, 0.0, 8, 0.0, 8, 1.0)))  # tau 0: every prediction is NaN
    edited = make_run(folder / "edited")
    port = free_port()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        apps = {
            "single": ("/", {"run": single, **LIMITS}),
            "pair": ("/pair", {"run": pair}),
            "broken": ("/broken", {"run": broken, "max_batch": 1, "max_queued": 0}),
            "edited": ("/edited", {"run": edited.uri, "batch_wait_ms": 100}),  # so that requests sent together are answered together
            "spread": ("/spread", {"run": single, "shard_actors": 2}),
        }
        serve.run_many([serve.RunTarget(build_app(args), name=name, route_prefix=prefix) for name, (prefix, args) in apps.items()])
        logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
        yield Served(f"http://127.0.0.1:{port}", Predictor.open(single), Predictor.open(pair), edited, logs)
    finally:
        serve.shutdown()
        ray.shutdown()


def expected_scores(predictor: Predictor, text: str) -> dict[str, Any]:
    return named(predictor.predict([(text, None)]).answers[0])


def named(answer: Any) -> dict[str, Any]:
    """Scores by label, to be compared with what came over HTTP."""
    return dict(zip(LABELS, (pytest.approx(float(p), abs=1e-5) for p in answer), strict=True))


def scores(answer: list[dict[str, Any]]) -> dict[str, float]:
    return {a["label"]: a["score"] for a in answer}


def expected_rows(predictor: Predictor, hits: Hits, query: int, score: str) -> list[dict[str, Any]]:
    """The rows that a search found for a query, as the API writes them."""
    out = []
    for position, value in zip(hits.positions[query], hits.scores[query], strict=True):
        if position >= 0:
            row = predictor.row(int(position))
            del row["asked_label"]
            out.append(row | {"score": pytest.approx(row["score"], abs=1e-6), score: pytest.approx(float(value), abs=1e-5)})
    return out


# routes


def test_shards_in_actors_answer_as_shards_in_the_replica(served: Served) -> None:
    body = {"inputs": ["a fine film", "never cold"]}
    for route, more in (("predict", {}), ("explain", {}), ("retrieve", {"mode": "hybrid", "k": 12})):
        assert served.post(f"spread/{route}", body | more).json() == served.post(route, body | more).json()
    states = [a["State"] for a in ray._private.state.actors().values() if a["ActorClassName"] == "ShardActor"]
    assert states == ["ALIVE", "ALIVE"]


def test_predict_one_text_is_a_list_of_scores_best_first(served: Served) -> None:
    answer = served.post("predict", {"inputs": "a fine film"}).json()
    assert {a["label"]: a["score"] for a in answer} == expected_scores(served.single, "a fine film")
    assert answer[0]["score"] > answer[1]["score"]
    assert sum(a["score"] for a in answer) == pytest.approx(1, abs=1e-5)


def test_predict_list_keeps_order_and_top_k_cuts(served: Served) -> None:
    texts = ["so weak", "a fine film", "never cold"]
    answer = served.post("predict", {"inputs": [texts[0], {"text": texts[1]}, {"text": texts[2], "text_pair": None}]}).json()
    assert [{a["label"]: a["score"] for a in row} for row in answer] == [expected_scores(served.single, t) for t in texts]
    cut = served.post("predict", {"inputs": texts, "top_k": 1}).json()
    assert [[a["label"] for a in row] for row in cut] == [[row[0]["label"]] for row in answer]
    assert len(served.post("predict", {"inputs": texts[0], "top_k": 9}).json()) == 2
    assert len(served.post("predict", {"inputs": texts[:1]}).json()) == 1


def test_spaces_and_newlines_are_those_of_the_task_rows() -> None:
    args = ServeArgs(run="x")
    assert read_texts("  a fine\n\tfilm ", False, args) == [("a fine film", None)]
    assert read_texts([{"text": "a\nb", "text_pair": " c  d"}], True, args) == [("a b", "c d")]


def test_retrieve_gives_the_nearest_rows(served: Served) -> None:
    answer = served.post("retrieve", {"inputs": "a dull film", "k": 3}).json()
    assert answer == expected_rows(served.single, served.single.retrieve([("a dull film", None)], 3), 0, "similarity")
    assert answer[0] == {  # position 6, the first negative one, whose teacher says 0.95
        "id": "train-000006",
        "text": "a dull film",
        "text_pair": None,
        "source": "task",
        "label": "negative",
        "score": pytest.approx(0.95, abs=1e-6),
        "similarity": pytest.approx(1, abs=1e-5),
    }


def test_retrieve_modes(served: Served) -> None:
    texts = ["never dull", "so cold"]
    queries = [(t, None) for t in texts]
    dense = [expected_rows(served.single, served.single.retrieve(queries, 4), i, "similarity") for i in range(2)]
    lexical = [expected_rows(served.single, served.single.knowledge.view.search_words(queries, 4), i, "bm25") for i in range(2)]
    # "never" is in rows 5 and 11, "dull" in 5 and 6, "cold" in 7 and 10; row 7 is the shorter one. "so" is in none.
    assert [[r["id"] for r in rows] for rows in lexical] == [
        ["train-000005", "train-000011", "train-000006"],
        ["train-000007", "train-000010"],
    ]
    assert served.post("retrieve", {"inputs": texts, "k": 4}).json() == dense
    for mode, want in (("dense", dense), ("lexical", lexical)):
        assert served.post("retrieve", {"inputs": texts, "k": 4, "mode": mode}).json() == want
        assert served.post("retrieve", {"inputs": texts[1], "k": 4, "mode": mode}).json() == want[1]
    hybrid = [{"dense": d, "lexical": x} for d, x in zip(dense, lexical, strict=True)]
    assert served.post("retrieve", {"inputs": texts, "k": 4, "mode": "hybrid"}).json() == hybrid
    assert served.post("retrieve", {"inputs": texts[0], "k": 4, "mode": "hybrid"}).json() == hybrid[0]


def test_retrieve_of_a_text_that_shares_no_word_finds_nothing_by_words(served: Served) -> None:
    assert served.post("retrieve", {"inputs": "unheard of", "mode": "lexical"}).json() == []
    both = served.post("retrieve", {"inputs": ["unheard of"], "mode": "hybrid", "k": 2}).json()[0]
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
def test_retrieve_filters(served: Served, where: dict[str, Any], rows: range) -> None:
    query = "a very cold film"
    ids = [f"train-{i:06d}" for i in rows]
    dense = served.post("retrieve", {"inputs": query, "k": 100, **where}).json()
    assert sorted(r["id"] for r in dense) == ids
    assert dense == expected_rows(served.single, served.single.retrieve([(query, None)], 12, **where), 0, "similarity")
    lexical = served.post("retrieve", {"inputs": query, "k": 100, "mode": "lexical", **where}).json()
    assert sorted(r["id"] for r in lexical) == [i for i in ids if set(query.split()) & set(TEXTS[int(i[-2:])].split())]
    assert lexical == expected_rows(served.single, served.single.knowledge.view.search_words([(query, None)], 12, **where), 0, "bm25")
    assert served.post("retrieve", {"inputs": query, "k": 100, "mode": "hybrid", **where}).json() == {"dense": dense, "lexical": lexical}
    assert served.post("retrieve", {"inputs": query, "k": 2, **where}).json() == dense[:2]  # filtered before it is cut, not after


def test_bad_filter_is_refused_and_the_good_requests_beside_it_are_answered(served: Served) -> None:
    """Sent together to an app that waits 100 ms for others: they are one batch, and each gets its own answer."""
    bad = [{"label": "warm"}, {"source": "web"}, {"label": "negative", "source": "web"}, {"mode": "hybrid", "label": "warm"}]
    good = [{"k": 1}, {"k": 2}, {"label": "negative"}, {"mode": "lexical"}, {"mode": "hybrid", "source": "task"}, {"k": 2}]
    bodies = [{"inputs": [TEXTS[i], TEXTS[-1 - i]], **more} for i, more in enumerate([*bad, *good])]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: served.post("edited/retrieve", body), bodies))
    assert [a.status_code for a in answers] == [422] * 4 + [200] * 6
    for answer, error in zip(
        answers,
        [
            r"label: found 'warm'; the labels of tiny are negative, positive",
            r"source: found 'web'; the sources of .* are .*generated, task",
            r"source: found 'web'; the sources of .* are .*generated, task",
            r"label: found 'warm'; the labels of tiny are negative, positive",
        ],
        strict=False,
    ):
        assert re.fullmatch(error, answer.json()["error"])
        assert answer.json()["expected"] == "a label of the task, a source of the store"
    for answer, body in zip(answers[4:], bodies[4:], strict=True):
        assert answer.json() == close_to(served.post("edited/retrieve", body).json())  # as when asked alone
    assert [[len(rows) for rows in answers[i].json()] for i in (4, 5, 9)] == [[1, 1], [2, 2], [2, 2]]
    assert answers[5].json()[0][0]["text"] == TEXTS[5] and answers[9].json()[1][0]["text"] == TEXTS[-10]


def test_retrieve_more_than_there_are_gives_all(served: Served) -> None:
    many = served.post("retrieve", {"inputs": ["a film", "so cold"], "k": 100}).json()
    assert [sorted(r["id"] for r in rows) for rows in many] == [sorted(f"train-{i:06d}" for i in range(12))] * 2
    assert len(served.post("retrieve", {"inputs": "a film"}).json()) == 8


def voted(rows: list[dict[str, Any]], score: str, tau: float) -> list[float]:
    """The vote of rows as the API shows them, in plain loops; a row's teacher gives its label `score` and the other the rest."""
    weights = [math.exp((r[score] - rows[0][score]) / tau) for r in rows]
    positive = [r["score"] if r["label"] == "positive" else 1 - r["score"] for r in rows]
    share = sum(w * p for w, p in zip(weights, positive, strict=True)) / sum(weights)
    return [1 - share, share]


def test_explain_shows_both_sides_and_what_they_voted(served: Served) -> None:
    answer = served.post("explain", {"inputs": "the cast was cold"}).json()
    found = served.single.predict([("the cast was cold", None)])
    assert found.dense is not None and found.lexical is not None
    assert set(answer) == {"prediction", "student", "votes", "neighbours", "lexical_neighbours", "mixture"}
    assert scores(answer["prediction"]) == named(found.answers[0])
    assert scores(answer["student"]) == named(found.student[0])
    assert answer["neighbours"] == expected_rows(served.single, found.dense, 0, "similarity")
    assert answer["lexical_neighbours"] == expected_rows(served.single, found.lexical, 0, "bm25")
    assert (len(answer["neighbours"]), len(answer["lexical_neighbours"])) == (8, 4)
    assert answer["mixture"] == {"student": 0.5, "dense": 0.3, "lexical": 0.2, "k": 8, "tau": 0.1, "lexical_k": 4, "lexical_tau": 1.0}
    assert set(answer["votes"]) == {"dense", "lexical"}
    assert scores(answer["votes"]["dense"]) == named(voted(answer["neighbours"], "similarity", 0.1))
    assert scores(answer["votes"]["lexical"]) == named(voted(answer["lexical_neighbours"], "bm25", 1.0))
    for side in (answer["prediction"], answer["student"], *answer["votes"].values()):
        assert side[0]["score"] >= side[1]["score"]
    # What is shown is what was mixed.
    parts = [(0.5, scores(answer["student"])), (0.3, scores(answer["votes"]["dense"])), (0.2, scores(answer["votes"]["lexical"]))]
    assert scores(answer["prediction"]) == named([sum(w * p[label] for w, p in parts) for label in LABELS])


def test_explain_where_no_row_shares_a_word(served: Served) -> None:
    strange, plain = served.post("explain", {"inputs": ["unheard of", "a film"]}).json()
    assert (strange["votes"]["lexical"], strange["lexical_neighbours"]) == (None, [])
    assert plain["votes"]["lexical"] is not None and len(plain["lexical_neighbours"]) == 4
    student, dense = scores(strange["student"]), scores(strange["votes"]["dense"])
    assert scores(strange["prediction"]) == named([0.7 * student[label] + 0.3 * dense[label] for label in LABELS])


def test_regression_of_a_pair_is_label_0(served: Served) -> None:
    pair = {"text": "a warm film", "text_pair": "a cold film"}
    value = pytest.approx(float(served.pair.predict([("a warm film", "a cold film")]).answers[0, 0]), abs=1e-5)
    assert served.post("pair/predict", {"inputs": pair}).json() == [{"label": "LABEL_0", "score": value}]
    assert served.post("pair/predict", {"inputs": [pair, pair]}).json() == [[{"label": "LABEL_0", "score": value}]] * 2
    first = {"text": TEXTS[0], "text_pair": TEXTS[-1]}
    row = served.post("pair/retrieve", {"inputs": first, "k": 1}).json()[0]
    assert (row["id"], row["text_pair"], row["label"], row["score"]) == ("train-000000", TEXTS[-1], "4.75", pytest.approx(4.75))
    # Both texts of a row are searched as one: rows 0 and 11 hold the same words.
    rows = served.post("pair/retrieve", {"inputs": first, "k": 2, "mode": "lexical"}).json()
    assert [r["id"] for r in rows] == ["train-000000", "train-000011"]
    assert rows[0]["bm25"] == rows[1]["bm25"]
    refused = served.post("pair/retrieve", {"inputs": first, "label": "positive"})
    assert (refused.status_code, refused.json()["error"]) == (
        422,
        "label: found 'positive'; the labels of tiny are none, it is a regression",
    )


def test_explain_in_regression(served: Served) -> None:
    answer = served.post("pair/explain", {"inputs": {"text": "a warm film", "text_pair": "never dull"}}).json()
    found = served.pair.predict([("a warm film", "never dull")])
    assert len({r["bm25"] for r in answer["lexical_neighbours"]}) > 1  # else tau would not matter
    values = {"student": float(found.student[0, 0])}
    for side, rows, score, tau in (("dense", "neighbours", "similarity", 0.1), ("lexical", "lexical_neighbours", "bm25", 1.0)):
        weights = [math.exp((r[score] - answer[rows][0][score]) / tau) for r in answer[rows]]
        values[side] = sum(w * r["score"] for w, r in zip(weights, answer[rows], strict=True)) / sum(weights)
        assert answer["votes"][side] == [{"label": "LABEL_0", "score": pytest.approx(values[side], abs=1e-5)}]
    assert answer["student"] == [{"label": "LABEL_0", "score": pytest.approx(values["student"], abs=1e-5)}]
    mixed = 0.5 * values["student"] + 0.3 * values["dense"] + 0.2 * values["lexical"]
    assert answer["prediction"] == [{"label": "LABEL_0", "score": pytest.approx(mixed, abs=1e-5)}]


def test_health_info_and_schema(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    info = httpx.get(f"{served.url}/info").json()
    assert info == served.single.info() | {"version": __version__, "limits": LIMITS}
    assert info["store"] == {"rows": 12, "version": 0}
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert set(paths) == {"/predict", "/retrieve", "/explain", "/health", "/info"}


def test_concurrent_requests_each_get_their_own_answer(served: Served) -> None:
    texts = [" ".join(WORDS[(i * s) % len(WORDS)] for s in (1, 2, 3, 5)) for i in range(1, 61)]

    def ask(i: int) -> Any:
        if i % 4 == 0:
            return served.post("retrieve", {"inputs": texts[i], "k": 1 + i % 5}).json()
        if i % 4 == 1:
            return served.post("predict", {"inputs": [texts[i], texts[i - 1]]}).json()
        if i % 4 == 2:
            return served.post(
                "retrieve", {"inputs": [texts[i], texts[i - 1]], "k": 3, "mode": "hybrid", "label": LABELS[i % 8 // 4]}
            ).json()
        return served.post("explain", {"inputs": texts[i]}).json()

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(60)))
    single = served.single
    for i, answer in enumerate(answers):
        queries = [(texts[i], None), (texts[i - 1], None)]
        if i % 4 == 0:
            assert answer == expected_rows(single, single.retrieve(queries, 1 + i % 5), 0, "similarity")
        elif i % 4 == 1:
            assert [scores(row) for row in answer] == [expected_scores(single, t) for t, _ in queries]
        elif i % 4 == 2:
            label = LABELS[i % 8 // 4]
            near, words = single.retrieve(queries, 3, label=label), single.knowledge.view.search_words(queries, 3, label=label)
            for j in range(2):
                want = {"dense": expected_rows(single, near, j, "similarity"), "lexical": expected_rows(single, words, j, "bm25")}
                assert answer[j] == want
        else:
            assert scores(answer["prediction"]) == expected_scores(single, texts[i])


# edits


def close_to(value: Any) -> Any:
    """The same answer but for the last digits of its numbers, which depend on the batch it was in."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-5)
    if isinstance(value, dict):
        return {k: close_to(v) for k, v in value.items()}
    return [close_to(v) for v in value] if isinstance(value, list) else value


QUERY = "a zebra film"


def asked(served: Served) -> dict[str, Any]:
    """What the edited run answers to one text on every route."""
    bodies = {
        "predict": {},
        "explain": {},
        "retrieve": {"k": 20, "mode": "hybrid"},
    }
    return {route: served.post(f"edited/{route}", {"inputs": QUERY, **body}).json() for route, body in bodies.items()}


def store_of(served: Served) -> dict[str, int]:
    return httpx.get(f"{served.url}/edited/info").json()["store"]


def test_running_server_sees_edits_at_once(served: Served) -> None:
    """Every edit is there in the next answer, whichever route is asked first; the replica neither starts anew nor is told."""
    knowledge = Knowledge.open(served.edited)
    version, rows = store_of(served)["version"], store_of(served)["rows"]
    before = asked(served)
    unknown = served.post("edited/retrieve", {"inputs": QUERY, "source": "added"})

    # add, and /predict first
    assert knowledge.add([{"id": "new-1", "text": QUERY, "label": "negative"}]) == ["new-1"]
    after = asked(served)
    assert store_of(served) == {"rows": rows + 1, "version": version + 1}
    want = {"id": "new-1", "text": QUERY, "text_pair": None, "source": "added", "label": "negative", "score": 1.0}
    for side, key in (("dense", "similarity"), ("lexical", "bm25")):
        first = after["retrieve"][side][0]
        assert {k: v for k, v in first.items() if k != key} == want
    assert after["retrieve"]["dense"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert after["explain"]["neighbours"][0]["id"] == after["explain"]["lexical_neighbours"][0]["id"] == "new-1"
    fresh = Predictor.open(served.edited)
    assert scores(after["predict"]) == scores(after["explain"]["prediction"]) == expected_scores(fresh, QUERY)
    assert scores(after["predict"])["negative"] > scores(before["predict"])["negative"] + 0.02
    assert after["explain"]["student"] == close_to(before["explain"]["student"])  # the student was not trained again
    only = served.post("edited/retrieve", {"inputs": QUERY, "source": "added", "mode": "hybrid"}).json()
    assert [[r["id"] for r in only[side]] for side in ("dense", "lexical")] == [["new-1"], ["new-1"]]

    # update, and /retrieve first
    knowledge.update([{"id": "new-1", "label": "positive"}])
    assert [(r["id"], r["label"]) for r in served.post("edited/retrieve", {"inputs": QUERY, "k": 1}).json()] == [("new-1", "positive")]
    changed = asked(served)
    assert scores(changed["predict"])["negative"] < scores(after["predict"])["negative"] - 0.02
    assert scores(changed["predict"]) == expected_scores(Predictor.open(served.edited), QUERY)
    assert store_of(served) == {"rows": rows + 1, "version": version + 2}

    # delete, and /info first
    knowledge.delete(["new-1"])
    assert store_of(served) == {"rows": rows, "version": version + 3}
    assert asked(served) == close_to(before)
    assert unknown.status_code == 422 and "new-1" not in unknown.text


def test_deleted_row_neither_votes_nor_is_found(served: Served) -> None:
    knowledge = Knowledge.open(served.edited)
    row = knowledge.view.row(knowledge.view.find(["train-000006"])["train-000006"])
    body = {"inputs": "a dull film", "k": 100, "mode": "hybrid"}
    before = served.post("edited/retrieve", body).json()
    knowledge.delete(["train-000006"])
    try:
        after = served.post("edited/retrieve", body).json()
        shown = served.post("edited/explain", {"inputs": "a dull film"}).json()
    finally:
        knowledge.add([{k: row[k] for k in ("id", "text", "teacher_probs")}])
    for side in ("dense", "lexical"):
        assert before[side][0]["id"] == "train-000006"
        assert [r["id"] for r in after[side]] == [r["id"] for r in before[side]][1:]
    assert after["dense"] == close_to(before["dense"][1:])
    assert "train-000006" not in [r["id"] for r in (*shown["neighbours"], *shown["lexical_neighbours"])]
    assert served.post("edited/retrieve", {"inputs": "a dull film", "k": 1}).json()[0]["id"] == "train-000006"


def test_compaction_under_a_running_server_changes_no_answer(served: Served) -> None:
    knowledge = Knowledge.open(served.edited)
    knowledge.add([{"id": "new-2", "text": QUERY, "label": "negative"}, {"id": "new-3", "text": "never cold", "label": "positive"}])
    knowledge.delete(["new-3"])
    before, store = asked(served), store_of(served)
    state = compact(served.edited)
    assert state is not None and state.edits == []
    assert store_of(served) == {"rows": store["rows"], "version": store["version"] + 1}
    assert asked(served) == close_to(before)
    # It is edited on, and the edit is seen.
    Knowledge.open(served.edited).delete(["new-2"])
    ids = [r["id"] for r in asked(served)["retrieve"]["dense"]]
    assert len(ids) == store["rows"] - 1 and "new-2" not in ids
    assert scores(asked(served)["predict"]) == expected_scores(Predictor.open(served.edited), QUERY)


@pytest.mark.parametrize("damaged", ["edit", "manifest", "base"])
def test_damaged_knowledge_is_not_answered_from(served: Served, damaged: str) -> None:
    """Altered before the replica has looked: every request fails, with an id under which the log names the file, until it is mended."""
    knowledge, code = Knowledge.open(served.edited), f"new-{damaged}"
    before = asked(served)
    knowledge.add([{"id": code, "text": QUERY, "label": "negative"}])
    folder = Path(served.edited.uri) / "knowledge"
    if damaged == "base":
        state = compact(served.edited)
        assert state is not None and state.base is not None
        path, offset = folder / state.base / "index" / "shard-0000.faiss", -1
    else:
        state = Knowledge.open(served.edited).view.log
        assert state is not None
        path, offset = (folder / "manifest.json", -3) if damaged == "manifest" else (folder / state.edits[-1]["file"], 40)
    whole = path.read_bytes()
    cut = bytearray(whole)
    cut[offset] ^= 1
    path.write_bytes(cut)
    try:
        bodies = [("predict", {}), ("predict", {}), ("retrieve", {}), ("retrieve", {"mode": "lexical"}), ("explain", {})]
        answers = [served.post(f"edited/{route}", {"inputs": QUERY, **body}) for route, body in bodies]
        answers.append(httpx.get(f"{served.url}/edited/info"))
        for answer in answers:
            assert answer.status_code == 500
            assert answer.json() == {"error": "the server failed on this request", "error_id": answer.json()["error_id"]}
        codes = [answer.json()["error_id"] for answer in answers]
        assert len(set(codes)) == len(codes)
        log = served.logged("edited", codes[-1])
        assert f"error {codes[0]} in POST" in log
        assert re.search(rf"ArtifactError: .*{path.name}.*(altered|not JSON|no checksum)", log)
    finally:
        path.write_bytes(whole)
    assert asked(served)["retrieve"]["dense"][0]["id"] == code  # the mended file is read without a restart
    Knowledge.open(served.edited).delete([code])
    assert asked(served) == close_to(before)


# refusals


@pytest.mark.parametrize(
    ("route", "body", "status", "error"),
    [
        ("predict", {"inputs": ""}, 422, "inputs is empty"),
        ("predict", {"inputs": ["a", " \n"]}, 422, "inputs[1] is empty"),
        ("predict", {"inputs": []}, 422, "inputs is an empty list"),
        ("predict", {"input": "a"}, 422, "inputs is missing"),
        ("predict", {"inputs": "a", "topk": 1}, 422, "there is no field topk"),
        ("predict", {"inputs": 3}, 422, "inputs: found 3"),
        ("predict", {"inputs": None}, 422, "inputs: found null"),
        ("predict", {"inputs": ["a", ["b"]]}, 422, 'inputs[1]: found ["b"]'),
        ("predict", {"inputs": {"txt": "a"}}, 422, 'inputs has the unknown field "txt"'),
        ("predict", {"inputs": {}}, 422, "inputs.text is missing"),
        ("predict", {"inputs": {"text": 1}}, 422, "inputs.text: found 1"),
        ("predict", {"inputs": {"text": "a", "text_pair": "b"}}, 422, "inputs.text_pair is given, but this task takes single texts"),
        ("predict", ["a"], 422, 'the body: found ["a"]'),
        ("predict", {"inputs": "a", "top_k": 0}, 422, "top_k: found 0"),
        ("predict", {"inputs": "a", "top_k": "1"}, 422, 'top_k: found "1"'),
        ("retrieve", {"inputs": "a", "k": 101}, 422, "k: found 101"),
        ("retrieve", {"inputs": "a", "k": 2.5}, 422, "k: found 2.5"),
        ("retrieve", {"inputs": "a", "mode": "fuzzy"}, 422, 'mode: found "fuzzy"'),
        ("retrieve", {"inputs": "a", "mode": None}, 422, "mode: found null"),
        ("retrieve", {"inputs": "a", "label": 1}, 422, "label: found 1"),
        ("retrieve", {"inputs": "a", "source": ["task"]}, 422, 'source: found ["task"]'),
        ("retrieve", {"inputs": "a", "label": "warm"}, 422, "label: found 'warm'; the labels of tiny are negative, positive"),
        ("retrieve", {"inputs": ["a"], "source": ""}, 422, "source: found ''; the sources of "),
        ("retrieve", {"inputs": "a", "where": {}}, 422, "there is no field where"),
        ("predict", {"inputs": "a", "mode": "dense"}, 422, "there is no field mode"),
        ("predict", {"inputs": ["a"] * 6}, 413, "inputs holds 6 texts"),
        ("predict", {"inputs": ["a", "a" * 201]}, 413, "inputs[1] has 201 characters"),
        ("explain", {"inputs": "a" * 5000}, 413, "the body has 5"),
        ("pair/predict", {"inputs": "a"}, 422, "inputs.text_pair is missing: this task compares two texts"),
        ("pair/predict", {"inputs": [{"text": "a"}]}, 422, "inputs[0].text_pair is missing"),
        ("pair/predict", {"inputs": {"text": "a", "text_pair": ""}}, 422, "inputs.text_pair is empty"),
        ("predict/", {"inputs": "a"}, 404, "Not Found"),
    ],
)
def test_refusal_says_why(served: Served, route: str, body: Any, status: int, error: str) -> None:
    answer = served.post(route, body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json()["error"].startswith(error)
    assert answer.json()["expected"]


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        (b"{bad", 400, "the body is not JSON: Expecting property name"),
        (b"", 422, "the body is empty"),
        (b'{"inputs": "\xff"}', 400, "There was an error parsing the body"),
        (b"[" * 3900, 400, "There was an error parsing the body"),
        (b'{"inputs": "\\ud800"}', 422, "inputs holds half of a surrogate pair"),
        (b'{"inputs": NaN}', 422, "inputs: found NaN"),
    ],
)
def test_body_that_is_no_json_or_no_text(served: Served, content: bytes, status: int, error: str) -> None:
    answer = httpx.post(f"{served.url}/predict", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"][: len(error)]) == (status, error)
    assert answer.json()["expected"]


def test_other_content_types_and_methods(served: Served) -> None:
    answer = httpx.post(f"{served.url}/predict", data={"inputs": "a"})
    assert answer.status_code == 415
    assert answer.json() == {"error": 'Content-Type: found "application/x-www-form-urlencoded"', "expected": "application/json"}
    assert httpx.post(f"{served.url}/predict", content=b'{"inputs": "a"}').status_code == 415
    answer = httpx.get(f"{served.url}/predict")
    assert (answer.status_code, answer.json()["error"]) == (405, "Method Not Allowed")
    assert "POST /predict" in httpx.get(f"{served.url}/nowhere").json()["expected"]


def test_chunked_body_is_bounded(served: Served) -> None:
    chunks = (b'{"inputs": "' if i == 0 else b"a" * 1000 for i in range(50))
    answer = httpx.post(f"{served.url}/predict", content=chunks, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (413, "the body has more than 4000 bytes")


def test_fault_of_the_server_is_json_with_an_id_that_the_log_has(served: Served) -> None:
    answer = served.post("broken/predict", {"inputs": "a film"})
    assert answer.status_code == 500
    assert answer.json()["error"] == "the server failed on this request"
    code = answer.json()["error_id"]
    text = served.logged("broken", code)
    assert f"error {code} in POST" in text
    assert "Out of range float values" in text


def test_overload_is_refused_with_retry_after(served: Served) -> None:
    heavy = {"inputs": ["a warm film"] * 256, "k": 12}  # two such at a time are what this app takes
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: served.post("broken/retrieve", heavy), range(12)))
    assert {a.status_code for a in answers} == {200, 503}
    refused = next(a for a in answers if a.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert refused.json() == {"error": "2 requests are waiting already", "expected": "the same request a second later"}
    assert served.post("broken/retrieve", {"inputs": "a film"}).status_code == 200


# page, client, config


def test_page_is_served_and_needs_nothing_else(served: Served) -> None:
    for path in ("/", "/pair/"):
        answer = httpx.get(served.url + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    page = answer.text
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write", page)
    assert set(re.findall(r'\$\("([\w-]+)"\)', page)) <= set(re.findall(r'id="([\w-]+)"', page))
    assert set(re.findall(r'for="([\w-]+)"', page)) == {"text", "text_pair"}


def test_page_shows_both_sides_under_the_names_that_explain_gives_them(served: Served) -> None:
    page, answer = httpx.get(served.url).text, served.post("explain", {"inputs": "a film"}).json()
    sides = re.findall(r'name: "(\w+)", rows: "(\w+)".* row\.(\w+)\.toFixed', page)
    assert sides == [("dense", "neighbours", "similarity"), ("lexical", "lexical_neighbours", "bm25")]
    for name, rows, score in sides:
        assert {name} <= answer["votes"].keys() & answer["mixture"].keys()
        assert isinstance(answer[rows][0][score], float)
        assert {f'id="{name}-{part}"' for part in ("vote", "rows", "rest")} <= set(re.findall(r'id="[\w-]+"', page))
    assert set(re.findall(r"found\.(\w+)", page)) <= answer.keys()


def run_client(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "serve" / "client.py"), *args], capture_output=True, text=True, timeout=60)


def test_client_command(served: Served) -> None:
    done = run_client("--url", served.url, "a fine film", "so weak")
    assert done.returncode == 0, done.stderr
    rows = [{a["label"]: a["score"] for a in json.loads(line)} for line in done.stdout.splitlines()]
    assert rows == [expected_scores(served.single, t) for t in ("a fine film", "so weak")]
    done = run_client("--url", served.url, "--retrieve", "2", "a dull film")
    assert json.loads(done.stdout)[0]["text"] == "a dull film"
    done = run_client("--url", f"{served.url}/pair", "--pair", "--explain", "a film", "a play")
    assert json.loads(done.stdout)["prediction"][0]["label"] == "LABEL_0"
    done = run_client("--url", served.url, "--retrieve", "2", "--mode", "hybrid", "--label", "negative", "--source", "task", "a dull film")
    both = {side: [r["id"] for r in rows] for side, rows in json.loads(done.stdout).items()}
    assert both == {"dense": ["train-000006", "train-000010"], "lexical": ["train-000006", "train-000010"]}
    done = run_client("--url", served.url, "--retrieve", "1", "--mode", "lexical", "never dull")
    assert {"id", "bm25"} <= json.loads(done.stdout)[0].keys()


def test_client_errors_are_one_line(served: Served) -> None:
    done = run_client("--url", served.url, "--pair", "a film", "a play")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {served.url}/predict answered 422: inputs[0].text_pair is given")
    done = run_client("--url", served.url, "--retrieve", "1", "--label", "warm", "a film")
    assert done.stderr.startswith(
        f"error: {served.url}/retrieve answered 422: label: found 'warm'; the labels of tiny are negative, positive"
    )
    done = run_client("--url", served.url, "--mode", "hybrid", "a film")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "client.py: error: --mode, --label and --source go with --retrieve")
    port = free_port()
    done = run_client("--url", f"http://127.0.0.1:{port}", "a film")
    assert (done.returncode, done.stderr) == (1, f"error: http://127.0.0.1:{port}/predict: [Errno 111] Connection refused\n")


def unknown_keys(value: Any, schema: Any, path: str = "") -> list[str]:
    """Keys of the YAML that Serve would ignore in silence; `schema` is the parsed model."""
    if isinstance(value, list):
        return [k for i, (v, s) in enumerate(zip(value, schema, strict=True)) for k in unknown_keys(v, s, f"{path}[{i}]")]
    if not isinstance(schema, BaseModel):
        return []
    known = type(schema).model_fields
    wrong = [f"{path}.{k}" for k in value if k not in known]
    return wrong + [k for name, v in value.items() if name in known for k in unknown_keys(v, getattr(schema, name), f"{path}.{name}")]


def test_yaml_has_only_keys_that_serve_and_the_app_know() -> None:
    config = yaml.safe_load((ROOT / "serve" / "retrikt.yaml").read_text())
    assert unknown_keys(config, ServeDeploySchema.model_validate(config)) == []
    (app,) = config["applications"]
    assert app["import_path"] == "retrikt_ray.serving.app:build_app"
    assert parse_args(app["args"]).run == "runs/quickstart"
    assert (config["http_options"]["host"], config["http_options"]["port"]) == ("127.0.0.1", 8000)
    typo = {**config, "http_options": {"prot": 8000}, "applications": [{**app, "route_prefx": "/"}]}
    assert unknown_keys(typo, ServeDeploySchema.model_validate(typo)) == [".http_options.prot", ".applications[0].route_prefx"]


# starting


def test_unknown_args_are_named() -> None:
    with pytest.raises(ConfigError, match=r"max_bach: there is no such key; did you mean max_batch\?"):
        build_app({"run": "x", "max_bach": 3})
    with pytest.raises(ConfigError, match="run: this key is required"):
        build_app({})
    with pytest.raises(ConfigError, match="replicas: found 0; "):
        build_app({"run": "x", "replicas": 0})


def test_busy_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            serve_run(str(make_run(tmp_path / "run")), "127.0.0.1", port, {})
    check_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match="port: found 70000, expected 1 to 65535"):
        check_port("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid:8000"):
        check_port("no.such.host.invalid", 8000)


def test_damaged_index_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shard = tmp_path / "run" / "index" / "shard-0001.faiss"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"index/shard-0001\.faiss was altered"):
        serve_run(str(run), "127.0.0.1", free_port(), {})


def test_serve_run_serves_until_interrupted(tmp_path: Path) -> None:
    run, port = make_run(tmp_path / "run"), free_port()
    code = f"from retrikt_ray.serving.app import serve_run; serve_run({str(run)!r}, '127.0.0.1', {port}, {{}})"
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    try:
        assert server.stdout is not None
        lines = [server.stdout.readline(), server.stdout.readline()]
        assert lines[0] == f"serving {run} on http://127.0.0.1:{port} (page; API in /openapi.json); Ctrl-C stops\n"
        assert lines[1].strip().startswith("curl ")
        answer = subprocess.run(lines[1].strip(), shell=True, capture_output=True, text=True, timeout=30)  # the line that users copy
        assert {a["label"] for a in json.loads(answer.stdout)} == set(LABELS)
        began = time.monotonic()
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=30)
        assert (server.returncode, rest) == (0, "stopping\n")
        assert time.monotonic() - began < 15
    finally:
        if server.poll() is None:
            server.kill()
    check_port("127.0.0.1", port)
