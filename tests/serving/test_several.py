"""Requests that name a run: where they go, and which of them open nothing. (`test_app.py` asks a server that has several.)"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from making.serving_local import JSON, Local
from making.serving_stub import ANSWER, Stub
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from retrikt_ray.serving.api.routes import build_api

ASK = {"content": '{"inputs": "a"}'}
KEY = "a-key-of-twenty-chars"


class Several(Stub):
    """A server beside whose own run there are others, each of which answers its name."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.opened_runs: list[str] = []
        self.slow = asyncio.Event()
        self.hold = self.name_of

    async def name_of(self, name: str) -> ASGIApp:
        self.opened_runs.append(name)
        if name == "slow":
            await self.slow.wait()
        return JSONResponse(name)


@pytest.fixture
def several() -> Several:
    return Several(deadline_s=0.2)


@pytest.mark.parametrize("header", ["serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id"])
def test_a_header_names_the_run(several: Several, header: str) -> None:
    api = Local(build_api(several))
    for name, want in (("mine.2", "mine.2"), ("", ANSWER)):
        assert api.request("POST", "/predict", headers=JSON | {header: name}, **ASK).json() == want
    assert api.post("predict", {"inputs": "a"}).json() == ANSWER
    assert several.opened_runs == ["mine.2"]


@pytest.mark.parametrize("name", ["..", "../run", "a/b", ".hidden", "a b", "é", "a" * 129])
def test_what_can_be_no_name_is_refused_unasked(several: Several, name: str) -> None:
    answer = Local(build_api(several)).request("POST", "/predict", headers=JSON | {"serve-multiplexed-model-id": name.encode()}, **ASK)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert several.opened_runs == []


def test_nobody_without_a_key_opens_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIKT_READ_KEYS", KEY)
    several = Several(open=None)
    api, named = Local(build_api(several)), {"serve_multiplexed_model_id": "mine"}
    assert api.request("POST", "/predict", headers=JSON | named, **ASK).status_code == 401
    for path in ("/", "/docs", "/health", "/openapi.json"):
        assert api.get(path, **named).status_code == 200
    assert several.opened_runs == []
    assert api.get("/info", **named, authorization=f"Bearer {KEY}").json() == "mine"


def test_who_waits_too_long_for_a_run_may_come_again(several: Several) -> None:
    api, named = Local(build_api(several)), JSON | {"serve_multiplexed_model_id": "slow"}
    answer = api.request("POST", "/predict", headers=named, **ASK)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json()["error"] == "the run slow is being opened"
    several.slow.set()
    assert api.request("POST", "/predict", headers=named, **ASK).json() == "slow"
    assert several.opened_runs == ["slow"]  # it was the same opening


def test_the_description_has_the_header_only_where_there_are_several_runs(several: Several) -> None:
    def parameters(stub: Stub) -> set[str]:
        paths = Local(build_api(stub)).get("/openapi.json").json()["paths"]
        return {
            path
            for path, ops in paths.items()
            for op in ops.values()
            for p in op.get("parameters", ())
            if p["in"] == "header" and p["name"].startswith("serve")
        }

    assert parameters(Stub()) == set()
    assert parameters(several) == {
        "/predict",
        "/",
        "/embed",
        "/retrieve",
        "/explain",
        "/knowledge",
        "/knowledge/preview",
        "/info",
        "/metrics",
    }
