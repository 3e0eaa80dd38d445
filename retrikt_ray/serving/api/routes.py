"""The routes: one table of operations, from which the ASGI app and its OpenAPI description are made."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.resources import files
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from retrikt_ray import __version__
from retrikt_ray.serving.answering.job import Answers, Job
from retrikt_ray.serving.api import edits
from retrikt_ray.serving.api.description import Handle, Operation, openapi
from retrikt_ray.serving.api.guard import Guard, Keys, needed, route_of
from retrikt_ray.serving.api.reading import Refusal, read_body, texts_of_inputs
from retrikt_ray.serving.api.several import PARAMETER, Several
from retrikt_ray.serving.api.wire import (
    RUN_HEADER,
    Body,
    DeleteBody,
    Edited,
    EmbedBody,
    Explanation,
    Found,
    Info,
    Listing,
    PredictBody,
    Preview,
    PreviewBody,
    PutBody,
    RetrieveBody,
    Scores,
    Sides,
    Strict,
)
from retrikt_ray.serving.replica import Endpoint

Model = TypeVar("Model", bound=Strict)
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
TEXT = "The river rises in the hills and reaches the sea near an old port"
INVALID, READS = (400, 413, 415, 422), (408, 503, 504)
IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "schema": {"type": "string"},
    "description": "The version that the edit was made for, as in ETag; else 412.",
}


Routes = dict[str, dict[str, Handle]]  # by path and method


class Api:
    """What handles each operation, over one replica."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def texts(self, request: Request, model: type[Model]) -> tuple[Model, Any, bool]:
        body: Any = read_body(await request.body(), model)
        texts, many = texts_of_inputs(body, self.endpoint.opened.facts.pair, self.endpoint.args)
        return body, texts, many

    async def predict(self, request: Request, nested: bool = False) -> Response:
        """Labels and scores of each text, best first. One text is answered by a list of scores, a list of texts by a list of such."""
        body, texts, many = await self.texts(request, PredictBody)
        answers = await self.endpoint.ask(Job("predict", texts, (body.most, body.raw)))
        return answered(answers, many or nested or body.nested)

    async def inference(self, request: Request) -> Response:
        """As /predict, in the shape of Hugging Face's Inference API: one text, too, is answered by a list of one answer."""
        return await self.predict(request, nested=True)

    async def embed(self, request: Request) -> Response:
        """The query vector of each text, of unit length; always a list of vectors, as in text-embeddings-inference."""
        _, texts, _ = await self.texts(request, EmbedBody)
        return answered(await self.endpoint.ask(Job("embed", texts)), True)

    async def retrieve(self, request: Request) -> Response:
        """Rows of the knowledge for each text: the nearest, those that share most words, or both."""
        body, texts, many = await self.texts(request, RetrieveBody)
        return answered(await self.endpoint.ask(Job("retrieve", texts, body)), many)

    async def explain(self, request: Request) -> Response:
        """The prediction of each text, what it rests on, and what it would be without each voice and each row."""
        _, texts, many = await self.texts(request, Body)
        return answered(await self.endpoint.ask(Job("explain", texts)), many)

    async def put(self, request: Request) -> Response:
        """Add rows, or put them in place of those that have their ids. All are there when this is answered, on every replica."""
        body = read_body(await request.body(), PutBody)
        return versioned(await edits.put(self.endpoint, body.rows, edits.expected_version(request.headers.get("if-match"))))

    async def delete(self, request: Request) -> Response:
        """Delete rows: their ids in the body, or in the query (?id=...&id=...). All are deleted, or none."""
        ids, raw = request.query_params.getlist("id"), await request.body()
        body = read_body(raw, DeleteBody) if raw or not ids else DeleteBody(ids=ids)
        return versioned(await edits.delete(self.endpoint, body.ids, edits.expected_version(request.headers.get("if-match"))))

    async def preview(self, request: Request) -> Response:
        """What an edit would do: the answer to each text as it is, and as it would be. Nothing is written."""
        body, texts, _ = await self.texts(request, PreviewBody)
        return versioned(await edits.preview(self.endpoint, body.rows, body.ids, texts))

    async def listing(self, request: Request) -> Response:
        """Rows of the knowledge, newest first, a page at a time."""
        return versioned(await edits.listing(self.endpoint, request.query_params))

    async def info(self, request: Request) -> Response:
        """What is served: task, labels, sizes, mixture, version, limits."""
        args = self.endpoint.args
        limits = {key: getattr(args, key) for key in ("max_texts", "max_text_chars", "max_body_bytes", "deadline_s")}
        return JSONResponse(await self.endpoint.info() | {"version": __version__, "limits": limits})

    async def health(self, request: Request) -> Response:
        """Whether the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether it can answer: its knowledge can be read, and there is room for a request."""
        if self.endpoint.active >= self.endpoint.args.capacity:
            raise Refusal(503, f"{self.endpoint.active} requests are waiting already", "less load", {"Retry-After": "1"})
        await self.endpoint.info()
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """Figures for Prometheus."""
        return Response(self.endpoint.metrics.text(), media_type="text/plain; version=0.0.4")

    def operations(self) -> list[Operation]:
        """The table. Those that are asked most stand first, where they are found soonest."""
        one, several = {"inputs": TEXT}, {"inputs": [TEXT, "A second text"]}
        row = {"text": "The barista robot in the lobby is broken", "label": "complaint"}
        asked, edit = (*INVALID, *READS), (*INVALID, 403, 408, 412, 503)
        many = list[Scores]
        return [
            Operation(
                "POST", "/predict", self.predict, Scores | many, PredictBody,
                {"a text": one, "several, the best label": {**several, "top_k": 1}, "as the Inference API": {**one, "parameters": {"top_k": 2}}}, asked,
            ),
            Operation("POST", "/", self.inference, many, PredictBody, {"a text": {**one, "parameters": {"top_k": 2}}}, asked),
            Operation("POST", "/embed", self.embed, list[list[float]], EmbedBody, {"a text": one, "several": several}, asked),
            Operation(
                "POST", "/retrieve", self.retrieve, list[Found] | Sides | list[list[Found]] | list[Sides], RetrieveBody,
                {"the nearest": {**one, "k": 3}, "by words, of a source": {**one, "mode": "lexical", "source": "task"}}, asked,
            ),
            Operation("POST", "/explain", self.explain, Explanation | list[Explanation], Body, {"a text": one}, asked),
            Operation(
                "GET", "/knowledge", self.listing, Listing, None, {}, (422, 503),
                tuple({"name": name, "in": "query", "schema": schema, "description": text} for name, (schema, text) in edits.QUERY.items()),
            ),
            Operation("PUT", "/knowledge", self.put, Edited, PutBody, {"a row": {"rows": [row]}}, edit, (IF_MATCH,)),
            Operation(
                "DELETE", "/knowledge", self.delete, Edited, DeleteBody, {"a row": {"ids": ["added-f3625ad92eb11bd7"]}}, (*edit, 404),
                ({"name": "id", "in": "query", "schema": {"type": "array", "items": {"type": "string"}}, "description": "In place of a body."}, IF_MATCH),
            ),
            Operation("POST", "/knowledge/preview", self.preview, Preview, PreviewBody, {"a row": {"rows": [row], **one}}, (*edit, 404)),
            Operation("GET", "/info", self.info, Info),
            Operation("GET", "/health", self.health, dict[str, str]),
            Operation("GET", "/ready", self.ready, dict[str, str], statuses=(503,)),
            Operation("GET", "/metrics", self.metrics, str),
        ]  # fmt: skip


class Table:
    """The ASGI app of routes whose paths are fixed: two look-ups, where a framework tries one pattern after the other."""

    def __init__(self, routes: Routes) -> None:
        self.routes, self.rest = routes, Router()  # which knows what to do with what is no request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.rest(scope, receive, send)
            return
        methods = self.routes.get(route_of(scope))
        if methods is None:
            raise HTTPException(404)
        handle = methods.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if handle is None:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(methods))})
        response = await handle(Request(scope, receive, send))
        await response(scope, receive, send)


def answered(answers: Answers, many: bool) -> Response:
    """A list for a list, one answer for one text; with the version that it is from, and how many actors' shards it does without."""
    headers = {"X-Knowledge-Version": answers.version} | ({"X-Knowledge-Missing": str(answers.missing)} if answers.missing else {})
    return Response(f"[{','.join(answers.items)}]" if many else answers.items[0], headers=headers, media_type="application/json")


def versioned(answer: dict[str, Any]) -> Response:
    return JSONResponse(answer, headers={"ETag": f'"{answer["version"]}"'})


def routes_of(endpoint: Endpoint) -> Table:
    """What is answered, and counted, over one run."""
    operations = Api(endpoint).operations()
    if endpoint.hold:
        operations = [
            replace(op, statuses=(*op.statuses, 404, 503), parameters=(*op.parameters, PARAMETER)) if needed(op.method, op.path) else op
            for op in operations
        ]
    schema, metrics = openapi(operations), endpoint.metrics
    pages = {name: (files("retrikt_ray.serving.api") / f"{name}.html").read_text(encoding="utf-8") for name in ("page", "docs")}

    def counted(op: Operation) -> Handle:
        name = f"{op.method} {op.path}"
        seconds = metrics.seconds.labels(name)
        statuses: dict[int, Any] = {}  # looked up once: labels() takes as long as a tenth of a small request

        async def handle(request: Request) -> Response:
            began, status = time.perf_counter(), 500
            try:
                response = await op.handle(request)
                status = response.status_code
                return response
            except HTTPException as error:
                status = error.status_code
                raise
            finally:
                if status not in statuses:
                    statuses[status] = metrics.requests.labels(name, str(status))
                statuses[status].inc()
                seconds.observe(time.perf_counter() - began)

        return handle

    def page(name: str) -> Handle:
        async def show(_: Request) -> Response:
            return HTMLResponse(pages[name], headers={"Content-Security-Policy": PAGE_POLICY})

        return show

    async def described(_: Request) -> Response:
        return JSONResponse(schema)

    routes: Routes = {"/": {"GET": page("page")}, "/docs": {"GET": page("docs")}, "/openapi.json": {"GET": described}}
    for op in operations:
        routes.setdefault(op.path, {})[op.method] = counted(op)
    return Table(routes)


def build_api(endpoint: Endpoint, echo: bool = True) -> ASGIApp:
    """The ASGI app over one replica. echo: as for Guard."""
    app: ASGIApp = routes_of(endpoint)
    if endpoint.hold:
        app = Several(app, endpoint.hold, endpoint.args.deadline_s)
    app = Guard(app, endpoint.args, Keys.load(endpoint.args), echo)
    if endpoint.args.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=endpoint.args.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type", "if-match", "x-request-id", RUN_HEADER, RUN_HEADER.replace("_", "-")],
            expose_headers=["etag", "x-knowledge-version", "x-knowledge-missing", "x-request-id", "retry-after"],
        )
    return app
