"""Knowledge over HTTP, in this process: rows are put, deleted, listed and tried out; the answers, and the versions, say so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from making.serving_local import JSON, Local, Replica, close_to, replica, scores
from making.tiny_run import TEXTS

from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.predictor import Predictor
from retrikt_ray.serving.api.routes import build_api

QUERY = "a zebra film"


@pytest.fixture
def served(run: str) -> Iterator[Replica]:
    with replica(run, max_texts=5, max_text_chars=200) as opened:
        yield opened


def at(served: Replica, edits: int) -> str:
    """The version after so many edits."""
    return f"{served.predictor.release}.{edits}"


def send(served: Local, method: str, body: Any = None, path: str = "/knowledge", **headers: str) -> httpx.Response:
    content = None if body is None else json.dumps(body)
    return served.request(method, path, content=content, headers={**(JSON if body is not None else {}), **headers})


def put(served: Local, *rows: Any, **headers: str) -> httpx.Response:
    return send(served, "PUT", {"rows": list(rows)}, **headers)


def test_a_row_that_is_put_changes_the_answer_and_deleted_it_changes_back(run: str, served: Replica) -> None:
    before = served.post("predict", {"inputs": QUERY})
    assert before.headers["x-knowledge-version"] == at(served, 0)
    answer = put(served, {"text": QUERY, "label": "negative"})
    (code,) = answer.json()["ids"]
    assert (answer.status_code, answer.json(), answer.headers["etag"]) == (
        200,
        {"version": at(served, 1), "ids": [code], "before": []},
        f'"{at(served, 1)}"',
    )
    after = served.post("predict", {"inputs": QUERY})
    assert after.headers["x-knowledge-version"] == at(served, 1)
    assert scores(after.json())["negative"] > scores(before.json())["negative"] + 0.02
    with replica(run) as restarted:  # and the command line sees what HTTP wrote
        assert restarted.post("predict", {"inputs": QUERY}).json() == after.json()
    assert Knowledge.open(run).view.find([code])

    # The same id is put in place; what was there comes back, and undoes it.
    changed = put(served, {"id": code, "text": QUERY, "label": "positive"}).json()
    assert changed == {"version": at(served, 2), "ids": [code], "before": [{"id": code, "text": QUERY, "teacher_probs": [1.0, 0.0]}]}
    assert scores(served.post("predict", {"inputs": QUERY}).json())["positive"] > scores(before.json())["positive"]
    assert put(served, *changed["before"]).json()["before"][0]["teacher_probs"] == [0.0, 1.0]
    assert served.post("predict", {"inputs": QUERY}).json() == after.json()

    gone = send(served, "DELETE", {"ids": [code]})
    assert gone.json() == {"version": at(served, 4), "ids": [], "before": [{"id": code, "text": QUERY, "teacher_probs": [1.0, 0.0]}]}
    assert served.post("predict", {"inputs": QUERY}).json() == before.json()


def test_two_replicas_and_the_command_line_write_one_log(run: str, served: Replica) -> None:
    """Writers at once lose nothing, and each sees what the others wrote."""
    with replica(run) as other:
        knowledge = Knowledge.open(run)

        def write(i: int) -> None:
            if i % 3 == 2:
                knowledge.add({"id": f"new-{i}", "text": f"number {i}", "label": "positive"})
            else:
                target = (served, other)[i % 3]
                one = Local(build_api(target.endpoint))  # each thread needs an event loop of its own
                assert put(one, {"id": f"new-{i}", "text": f"number {i}", "label": "positive"}).status_code == 200

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(write, range(18)))
        want = {f"new-{i}" for i in range(18)}
        for target in (served, other):
            listed = send(target, "GET", path="/knowledge?source=added&limit=100").json()
            assert ({row["id"] for row in listed["rows"]}, listed["version"], listed["total"]) == (want, at(served, 18), 18)


def test_an_edit_for_another_version_is_refused(served: Replica) -> None:
    row = {"text": QUERY, "label": "negative"}
    assert put(served, row, **{"If-Match": f'"{at(served, 0)}"'}).json()["version"] == at(served, 1)
    for method, body in (("PUT", {"rows": [row]}), ("DELETE", {"ids": ["train-000000"]})):
        answer = send(served, method, body, **{"If-Match": f'"{at(served, 0)}"'})
        assert (answer.status_code, answer.json()["code"]) == (412, "version_differs")
        assert answer.json()["error"] == "the knowledge is of version 1, the edit was made for 0"
    assert send(served, "GET").json()["version"] == at(served, 1)
    assert put(served, row, **{"If-Match": f'W/"{at(served, 1)}"'}).json()["version"] == at(served, 2)
    assert put(served, row, **{"If-Match": "*"}).json()["version"] == at(served, 3)
    for unreadable in ("one", "3", '"zzzzzzzzzzzz.3"'):
        assert put(served, row, **{"If-Match": unreadable}).status_code == 422
    answer = put(served, row, **{"If-Match": '"0123456789ab.3"'})
    assert (answer.status_code, answer.json()["error"]) == (412, "the edit was made for another run than the one that answers")


def test_listing_pages_filters_and_searches(served: Replica) -> None:
    assert send(served, "GET", path="/knowledge?source=added").json() == {"version": at(served, 0), "total": 0, "rows": []}
    put(served, {"id": "a", "text": "An odd Zebra", "label": "negative"}, {"id": "b", "text": "so warm", "label": "positive"})
    whole = send(served, "GET").json()
    ids = [row["id"] for row in whole["rows"]]
    assert (whole["version"], whole["total"], ids) == (at(served, 1), 14, ["b", "a", *(f"train-{i:06d}" for i in range(11, -1, -1))])
    assert whole["rows"][1] == {
        "id": "a", "text": "An odd Zebra", "text_pair": None, "source": "added", "label": "negative", "score": 1.0,
    }  # fmt: skip

    def found(query: str) -> list[str]:
        return [row["id"] for row in send(served, "GET", path=f"/knowledge?{query}").json()["rows"]]

    assert found("offset=1&limit=2") == ids[1:3]
    assert found("q=ZEBRA") == ["a"] and found("q=z.bra") == []
    assert found("q=film&label=negative&source=task") == [f"train-{i:06d}" for i in (10, 6)]
    for query, error in (
        ("limit=0", 'limit: found "0"'),
        ("limit=201", 'limit: found "201"'),
        ("offset=-1", 'offset: found "-1"'),
        ("label=warm", "label: found 'warm'; the labels of tiny are negative, positive"),
        ("sort=id", 'there is no parameter "sort"'),
    ):
        answer = send(served, "GET", path=f"/knowledge?{query}")
        assert (answer.status_code, answer.json()["error"]) == (422, error)


def test_preview_tells_what_would_change_and_writes_nothing(run: str, served: Replica) -> None:
    texts = [QUERY, "a warm film"]
    before = served.post("predict", {"inputs": texts}).json()
    rows = [{"text": QUERY, "label": label} for label in ("negative", "positive")]
    answers = [send(served, "POST", {"rows": [row], "inputs": texts}, "/knowledge/preview").json() for row in rows]
    for answer, row in zip(answers, rows, strict=True):
        assert answer["version"] == at(served, 0)
        assert [a["before"] for a in answer["answers"]] == close_to(before)
        put(served, row)
        after = served.post("predict", {"inputs": texts}).json()
        assert [a["after"] for a in answer["answers"]] == close_to(after)
        assert [a["changed"] for a in answer["answers"]] == [a[0]["label"] != b[0]["label"] for a, b in zip(before, after, strict=True)]
        send(served, "DELETE", {"ids": send(served, "GET", path="/knowledge?source=added").json()["rows"][0:1][0]["id"].split()})
    assert {a["answers"][0]["changed"] for a in answers} == {True, False}  # one of the two labels is another one
    gone = send(served, "POST", {"ids": ["train-000006"], "inputs": "a dull film"}, "/knowledge/preview").json()
    want = served.post("explain", {"inputs": "a dull film"}).json()
    assert gone["answers"][0]["before"] == close_to(want["prediction"]) and gone["answers"][0]["after"] != want["prediction"]
    assert Predictor.open(run).knowledge.view.find(["train-000006"])


@pytest.mark.parametrize(
    ("method", "body", "status", "error"),
    [
        ("PUT", {"rows": []}, 422, "no rows to put"),
        ("PUT", {"rows": [{"label": "positive"}]}, 422, "row 1: text: found null"),
        ("PUT", {"rows": [{"text": "a", "label": "warm"}]}, 422, "row 1: label: found 'warm'; the labels of tiny are negative, positive"),
        ("PUT", {"rows": [{"text": "a", "label": "positive"}, {"text": "b", "lable": 1}]}, 422, "row 2: there is no field 'lable'"),
        ("PUT", {"rows": [{"text": "a"}]}, 422, "row 1: there is no label, and the run has no teacher that could give one"),
        ("PUT", {"rows": [{"text": "a", "label": "positive"}] * 2}, 422, "rows 1 and 2 have the same id"),
        ("PUT", {"rows": ["a", {"text": "b" * 201}]}, 413, "rows[1].text has 201 characters"),
        ("PUT", {"rows": ["a"] * 6}, 413, "rows holds 6"),
        ("PUT", {"row": []}, 422, "rows is missing"),
        ("PUT", {"rows": {"text": "a"}}, 422, 'rows: found {"text": "a"}'),
        ("DELETE", {"ids": ["nobody"]}, 404, "the run has no row with the id 'nobody'"),
        ("DELETE", {"ids": ["train-000000", "nobody"]}, 404, "the run has no row with the id 'nobody'"),
        ("DELETE", {"ids": []}, 422, "ids: found []"),
        ("DELETE", None, 422, "the body is empty"),
    ],
)  # fmt: skip
def test_a_bad_edit_is_refused_and_nothing_is_lost(served: Replica, method: str, body: Any, status: int, error: str) -> None:
    answer = send(served, method, body)
    assert (answer.status_code, answer.json()["error"][: len(error)]) == (status, error)
    assert answer.json()["expected"]
    assert {k: v for k, v in send(served, "GET").json().items() if k != "rows"} == {"version": at(served, 0), "total": len(TEXTS)}


def test_ids_can_stand_in_the_query(served: Replica) -> None:
    answer = send(served, "DELETE", path="/knowledge?id=train-000000&id=train-000001")
    assert (answer.status_code, [row["id"] for row in answer.json()["before"]]) == (200, ["train-000000", "train-000001"])
