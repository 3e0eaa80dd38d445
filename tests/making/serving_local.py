"""The routes of a replica without a cluster: asked in this process, or listening on a port of their own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from making.tiny_run import LABELS
from retrikt_ray.knowledge.view import Hits
from retrikt_ray.predictor import Predictor
from retrikt_ray.serving.api.routes import build_api
from retrikt_ray.serving.app import build_app
from retrikt_ray.serving.replica import Endpoint

JSON = {"Content-Type": "application/json"}


class Local:
    """An API, and the event loop that it answers in. root_path: the route prefix that it is served under."""

    def __init__(self, api: ASGIApp, root_path: str = "") -> None:
        self.loop = asyncio.Runner()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api, root_path=root_path), base_url="http://local")

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self.loop.run(self.client.request(method, path, **more))

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.request("GET", path, headers=headers)

    def post(self, route: str, body: Any) -> httpx.Response:
        return self.send(json.dumps(body), route)

    def send(self, content: Any, route: str = "predict", headers: Any = JSON) -> httpx.Response:
        """A body that is sent as it is; an async iterator is sent in pieces, without a Content-Length."""
        return self.request("POST", f"/{route}", content=content, headers=headers)

    def together(self, bodies: list[tuple[str, Any]]) -> list[httpx.Response]:
        """The answers to several (route, body), all of which wait at the same time."""

        async def work() -> list[httpx.Response]:
            return await asyncio.gather(*(self.client.post(f"/{route}", content=json.dumps(body), headers=JSON) for route, body in bodies))

        return self.loop.run(work())


class Replica(Local):
    """A real Endpoint over a run."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(build_api(endpoint))
        self.endpoint = endpoint

    @property
    def predictor(self) -> Predictor:
        return self.endpoint.opened.predictor  # type: ignore[union-attr]


async def only_serve(name: str) -> ASGIApp:
    raise AssertionError(f"{name}: only Serve holds several runs")


@contextmanager
def replica(run: str, **args: Any) -> Iterator[Replica]:
    """Open a replica as Serve does, but for the actor; everybody may read and write unless `open` says else."""
    app: Any = build_app({"run": run, "open": "write", **args})
    endpoint = Endpoint(app._bound_deployment.init_args[0])
    if endpoint.args.runs:
        endpoint.hold = only_serve
    yield Replica(endpoint)


@contextmanager
def listening(api: ASGIApp) -> Iterator[str]:
    """The API on a free loopback port; its URL."""
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def rows_of(predictor: Predictor, hits: Hits, by: str) -> list[list[dict[str, Any]]]:
    """The rows that a search found for each query, as the API writes them, from the table and the arrays."""
    out = []
    for positions, values in zip(hits.positions.tolist(), hits.scores.tolist(), strict=True):
        found = [(predictor.knowledge.view.row(p), value) for p, value in zip(positions, values, strict=True) if p >= 0]
        for row, value in found:
            negative, positive = row.pop("teacher_probs")
            del row["asked_label"]
            row |= {"label": LABELS[int(positive > negative)], "score": max(negative, positive), by: value}
        out.append([row for row, _ in found])
    return out


def named(answer: Any) -> dict[str, float]:
    """The scores of an answer (2,) by label."""
    return dict(zip(LABELS, map(float, answer), strict=True))


def scores(answer: list[dict[str, Any]]) -> dict[str, float]:
    """Scores by label."""
    return {a["label"]: a["score"] for a in answer}


def close_to(value: Any) -> Any:
    """The same answer but for the last digits of its numbers, which depend on the batch it was in."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-5)
    if isinstance(value, dict):
        return {k: close_to(v) for k, v in value.items()}
    return [close_to(v) for v in value] if isinstance(value, list) else value
