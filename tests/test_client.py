"""`retrikt_ray.Client` and `AsyncClient`, against replicas that listen on a port of their own, and against servers that are made up."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from making.serving_local import listening, named, replica
from making.tiny_run import make_run

from retrikt_ray import AsyncClient, Client
from retrikt_ray.client import ServerError
from retrikt_ray.predictor import Predictor
from retrikt_ray.serving.api.routes import build_api

OVERLOADED = {"error": "2 requests are waiting already", "code": "overloaded", "expected": "the same request a second later"}
SCORES = [[{"label": "positive", "score": 1.0}]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "single"))


@pytest.fixture(scope="module")
def url(run: str) -> Iterator[str]:
    with replica(run) as opened, listening(build_api(opened.endpoint)) as url:
        yield url


def test_every_call_and_its_types(run: str, url: str) -> None:
    predictor, texts = Predictor.open(run), ["a fine film", "so weak"]
    with Client(url) as client:
        found = client.predict(texts)
        assert [{s.label: s.score for s in scores} for scores in found] == [named(row) for row in predictor.predict(texts).answers]
        assert [len(scores) for scores in client.predict(texts, top_k=1)] == [1, 1]
        assert client.embed(texts) == predictor.student.encode([(t, None) for t in texts])[1].tolist()
        (near,) = client.retrieve(["a dull film"], k=2, label="negative", source="task")
        assert [(r.id, r.label) for r in near] == [("train-000006", "negative"), ("train-000010", "negative")] and near[0].bm25 is None
        (words,) = client.retrieve(["never dull"], k=1, mode="lexical", source="generated")
        assert words[0].id == "train-000005" and words[0].similarity is None
        (sides,) = client.retrieve_both(["a dull film"], k=1)
        assert (sides.dense[0].id, sides.lexical[0].id) == ("train-000006", "train-000006")
        assert client.explain(texts)[1].prediction == found[1]
        assert (client.info().release, client.info().store) == (predictor.release, {"rows": 12, "version": 0})


def test_knowledge_is_edited_with_versions(url: str) -> None:
    row = {"text": "a zebra film", "label": "negative"}
    with Client(url) as client:
        version = client.listing().version
        assert client.preview(["a zebra film"], rows=[row]).answers[0].after[0].label == "negative"
        put = client.put([row], version=version)
        listed = client.listing("ZEBRA", source="added", limit=1)
        assert ([r.id for r in listed.rows], listed.version, listed.total) == (put.ids, put.version, 1)
        with pytest.raises(
            ServerError, match=r"/knowledge answered 412: the knowledge is of version 1, the edit was made for 0; expected: "
        ) as error:
            client.delete(put.ids, version=version)
        assert (error.value.status, error.value.code) == (412, "version_differs")
        assert client.delete(put.ids).before[0]["text"] == "a zebra film"


def test_pairs_and_asyncio(tmp_path: Any) -> None:
    pair = str(make_run(tmp_path / "pair", pair=True, regression=True))

    async def work(url: str) -> Any:
        async with AsyncClient(url) as client:
            return await asyncio.gather(client.predict([("a film", "a play")]), client.explain([("a film", "a play")]), client.info())

    with replica(pair) as opened, listening(build_api(opened.endpoint)) as url:
        scores, explained, info = asyncio.run(work(url))
    value = Predictor.open(pair).predict(("a film", "a play")).scores[0]
    assert (scores[0][0].label, scores[0][0].score, explained[0].prediction) == ("LABEL_0", value, scores[0]) and info.pair


def test_both_clients_ask_the_same() -> None:
    public = [name for name in vars(Client) if not name.startswith("_")]
    assert public == [name for name in vars(AsyncClient) if not name.startswith("_")]
    for name in public:
        one, other = (inspect.signature(getattr(kind, name)) for kind in (Client, AsyncClient))
        assert one == other and inspect.iscoroutinefunction(getattr(AsyncClient, name))


def test_what_is_refused(url: str) -> None:
    with Client(url) as client:
        with pytest.raises(ServerError, match="/retrieve answered 422: label: found 'warm'; the labels of tiny are negative, positive"):
            client.retrieve(["a film"], label="warm")
        with pytest.raises(TypeError, match="expected a list of texts, found one str"):
            client.predict("a film")
    with Client("http://127.0.0.1:9", timeout_s=0.3) as client:
        with pytest.raises(ServerError, match="refused") as error:
            client.predict(["a film"])
        assert error.value.status == 0


# when to try again


def asked(answers: list[Any], use: Callable[[Client], Any], timeout_s: float = 5) -> tuple[Any, int, float]:
    """What a client makes of answers that come in turn: (status, body, headers), or an error; how often it asked, and for how long."""
    count, began = 0, time.monotonic()

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1
        answer = answers[min(count, len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        status, body, headers = answer
        return httpx.Response(status, content=json.dumps(body), headers=headers)

    with Client("http://made.up", key="secret", timeout_s=timeout_s, transport=httpx.MockTransport(handle)) as client:
        try:
            found = use(client)
        except ServerError as error:
            found = error
    return found, count, time.monotonic() - began


def predict(client: Client) -> Any:
    return client.predict(["a"])[0][0].label


def delete(client: Client) -> Any:
    return client.delete(["a"]).version


def test_it_comes_again_when_the_server_says() -> None:
    busy, good = (503, OVERLOADED, {"Retry-After": "1"}), (200, SCORES, {})
    found, count, took = asked([busy, (429, {}, {"Retry-After": "0"}), good], predict)
    assert (found, count) == ("positive", 3) and 1 <= took < 1.5
    found, count, took = asked([(503, OVERLOADED, {"Retry-After": "60"}), good], predict)
    assert (found.status, found.code, count) == (503, "overloaded", 1) and took < 0.5  # it would be too late
    found, count, took = asked([busy], predict, timeout_s=1.5)
    assert (found.status, count) == (503, 2) and took < 1.5
    for status in (400, 408, 422, 500, 504):
        assert asked([(status, {"error": "no", "code": "x"}, {}), good], predict)[1] == 1


def test_what_must_not_be_done_twice_is_not() -> None:
    """A connection that broke while an answer was awaited, and a replica that died over one: a deletion may have been made."""
    good, edited = (200, SCORES, {}), (200, {"version": "0123456789ab.1", "ids": [], "before": []}, {})
    lost, broken = (503, {"error": "it ended", "code": "interrupted"}, {"Retry-After": "0"}), httpx.ReadError("reset")
    assert asked([lost, broken, good], predict)[:2] == ("positive", 3)
    found, count, _ = asked([lost, edited], delete)
    assert (found.code, count) == ("interrupted", 1)
    found, count, _ = asked([broken, edited], delete)
    assert (found.code, found.status, count) == ("unreachable", 0, 1)
    assert asked([httpx.ConnectError("refused"), (503, OVERLOADED, {"Retry-After": "0"}), edited], delete)[:2] == ("0123456789ab.1", 3)
    assert asked([broken, edited], lambda client: client.put([{"text": "a"}]).version)[1] == 2  # ids follow from texts
    assert asked([broken, edited], lambda client: client.put([{"text": "a"}], version="0123456789ab.0").version)[1] == 1


def test_an_answer_of_something_else_is_an_error() -> None:
    found, count, _ = asked([(200, {"hello": 1}, {})], predict)
    assert (found.code, count) == ("unreadable", 1)
