"""Routes, methods, content types and sizes of requests, faults and floods: a replica without a model, in this process."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from making.serving_local import JSON, Local
from making.serving_stub import ANSWER, LIMITS, Stub
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from retrikt_ray import __version__
from retrikt_ray.serving.api.guard import Guard, Keys
from retrikt_ray.serving.api.routes import build_api
from retrikt_ray.serving.args import ServeArgs


def call(app: ASGIApp, sent: list[Any], **scope: Any) -> None:
    """Call an ASGI app as a server does that keeps the case of headers; sent: what it answers."""

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", **scope}, receive, send))  # type: ignore[arg-type]


def guarded(app: ASGIApp) -> Guard:
    args = ServeArgs(run="x", max_body_bytes=10, open="write")
    return Guard(app, args, Keys.load(args))


# routes


def test_health_info_and_schema(api: Local) -> None:
    assert api.get("/health").json() == {"status": "ok"}
    assert api.get("/info").json() == {"task": "stub", "version": __version__, "limits": LIMITS | {"deadline_s": 10}}
    schema = api.get("/openapi.json").json()
    answering = {"/", "/predict", "/embed", "/retrieve", "/explain", "/knowledge", "/knowledge/preview"}
    assert set(schema["paths"]) == answering | {"/health", "/ready", "/info", "/metrics"}
    statuses = {"200", "400", "401", "408", "413", "415", "422", "500", "503", "504"}
    assert set(schema["paths"]["/predict"]["post"]["responses"]) == statuses
    bodies = schema["components"]["schemas"]
    assert set(bodies["RetrieveBody"]["properties"]) == {"inputs", "truncate", "truncation_direction", "k", "mode", "label", "source"}
    assert bodies["Body"]["additionalProperties"] is False
    assert bodies["Body"]["properties"]["inputs"]["anyOf"][0] == {"type": "string"}


@pytest.mark.parametrize("prefix", ["", "/below/it"])
def test_page_is_served_and_needs_nothing_else(prefix: str) -> None:
    """Also where the app lives under a route prefix."""
    answer = Local(build_api(Stub()), prefix).get(f"{prefix}/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    page = answer.text
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write", page)
    assert set(re.findall(r'\$\("([\w-]+)"\)', page)) <= set(re.findall(r'id="([\w-]+)"', page))
    assert set(re.findall(r'for="([\w-]+)"', page)) == {"text", "text_pair", "key", "should", "words"}


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON ; charset=utf-8", 200),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
        ("application/jsonl", 415),
        ("", 415),
        (None, 415),
    ],
)
def test_only_json_is_taken(api: Local, kind: str | None, status: int) -> None:
    answer = api.send(b'{"inputs": "a"}', headers={} if kind is None else {"Content-Type": kind})
    assert answer.status_code == status
    if status == 415:
        found = "nothing" if kind is None else kind
        assert answer.json() == {"error": f'Content-Type: found "{found}"', "code": "wrong_type", "expected": "application/json"}


def test_names_of_headers_have_no_case() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse("good")(scope, receive, send)

    for names in (("content-type", "content-length"), ("Content-Type", "Content-Length"), ("CONTENT-TYPE", "CONTENT-LENGTH")):
        for values, status in (((b"application/json", b"10"), 200), ((b"text/plain", b"10"), 415), ((b"application/json", b"11"), 413)):
            sent: list[Any] = []
            headers = [(name.encode(), value) for name, value in zip(names, values, strict=True)]
            call(guarded(app), sent, method="POST", path="/x", headers=headers)
            assert sent[0]["status"] == status


def test_other_methods(api: Local) -> None:
    for method, path in (("GET", "/predict"), ("PUT", "/predict"), ("DELETE", "/info"), ("OPTIONS", "/retrieve")):
        answer = api.request(method, path)
        assert (answer.status_code, answer.json()) == (
            405,
            {"error": "Method Not Allowed", "code": "wrong_method", "expected": "a route and method of /openapi.json"},
        )
    for path in ("/nowhere", "/redoc", "/info/"):
        answer = api.get(path)
        assert (answer.status_code, answer.json()) == (
            404,
            {"error": "Not Found", "code": "not_found", "expected": "a route and method of /openapi.json"},
        )


# sizes


def body_of(size: int) -> bytes:
    """A body of so many bytes that is otherwise good."""
    return b'{"inputs": "a"' + b" " * (size - 15) + b"}"


def test_limits_are_inclusive(api: Local) -> None:
    assert api.post("predict", {"inputs": ["a" * 200] * 5}).status_code == 200
    assert [api.send(body_of(size)).status_code for size in (4000, 4001)] == [200, 413]
    assert api.send(body_of(4001)).json()["error"] == "the body has 4001 bytes"


def test_chunked_body_is_bounded_and_read_no_further(api: Local) -> None:
    sent = 0

    async def pieces(count: int) -> AsyncIterator[bytes]:
        nonlocal sent
        for i in range(count):
            sent += 1
            yield body_of(1000 * count)[1000 * i : 1000 * (i + 1)]

    assert api.send(pieces(4)).json() == ANSWER
    sent = 0
    answer = api.send(pieces(50))
    assert (answer.status_code, answer.json()["error"]) == (413, "the body has more than 4000 bytes")
    assert sent == 5


def test_a_body_that_is_announced_too_large_is_not_read(api: Local) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    answer = api.send(never(), headers={**JSON, "Content-Length": "4001"})
    assert (answer.status_code, answer.json()["error"]) == (413, "the body has 4001 bytes")


# faults and floods


def test_fault_of_the_server_is_json_with_an_id_that_the_log_has(log: pytest.LogCaptureFixture) -> None:
    stub = Stub()
    stub.opened.scores = lambda *_: [{"label": "a", "score": float("nan")}]  # type: ignore[method-assign]
    api = Local(build_api(stub), "/prefix")
    answers = [api.post(f"prefix/{route}", {"inputs": "a"}) for route in ("predict", "predict", "explain")]
    for answer, route in zip(answers, ("predict", "predict", "explain"), strict=True):
        code = answer.json()["error_id"]
        assert (answer.status_code, answer.json()) == (
            500,
            {"error": "the server failed on this request", "code": "failed", "error_id": code},
        )
        assert f"error {code} in POST /{route}" in log.text
    assert len({answer.json()["error_id"] for answer in answers}) == 3
    assert "ValueError" in log.text and "Out of range float values" not in log.text  # the place of a fault, not what was in it
    assert stub.active == 0


def test_what_has_begun_is_not_answered_twice(log: pytest.LogCaptureFixture) -> None:
    """A fault after the first byte went out can only end the connection."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("too late")

    sent: list[Any] = []
    with pytest.raises(RuntimeError, match="too late"):
        call(guarded(app), sent, method="GET", path="/x", headers=[])
    assert [m["type"] for m in sent] == ["http.response.start"]
    assert "in GET /x" in log.text


def test_overload_is_refused_with_retry_after() -> None:
    """As many requests as fit wait; the next is told to come again, and when they are done there is room anew."""
    stub = Stub(max_batch=2, max_queued=1)
    assert stub.args.capacity == 5
    api = Local(build_api(stub))

    async def crowd() -> tuple[list[Any], list[Any]]:
        stub.open.clear()
        first = [asyncio.ensure_future(api.client.post("/predict", json={"inputs": "a"})) for _ in range(5)]
        while len(stub.seen) < 5:
            await asyncio.sleep(0)
        late = [await api.client.post(f"/{route}", json={"inputs": "a"}) for route in ("predict", "retrieve", "explain")]
        stub.open.set()
        return await asyncio.gather(*first), late

    first, late = api.loop.run(crowd())
    assert [a.status_code for a in first] == [200] * 5
    for answer in late:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json() == {
            "error": "5 requests are waiting already",
            "code": "overloaded",
            "expected": "the same request a second later",
        }
    assert stub.active == 0
    assert api.post("predict", {"inputs": "a"}).status_code == 200
