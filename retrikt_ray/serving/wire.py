"""The HTTP side of serving: what a request may look like, how it is refused, and the routes.

Shapes follow Hugging Face's text-classification: one text is answered by a list of {label, score}, a list of texts by a list of such.
Every error is JSON that says what was found and what was expected.

What was left out on purpose: Swagger's page under /docs, which loads its scripts from a CDN; /openapi.json describes the same API.
"""

from __future__ import annotations

import json
import logging
import uuid
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrikt_ray import __version__
from retrikt_ray.task.files import tidy

if TYPE_CHECKING:
    from retrikt_ray.serving.app import Endpoint, ServeArgs
    from retrikt_ray.teacher.annotator import Text

ROUTES = "GET /, /health, /info, /openapi.json; POST /predict, /retrieve, /explain"
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
logger = logging.getLogger("ray.serve")  # Serve writes it to the replica's log file


class Refusal(HTTPException):
    """An answer other than 200, as JSON: what was wrong and what was expected."""

    def __init__(self, status: int, error: str, expected: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, error, headers)
        self.expected = expected


def refuse(_: Request | None, error: Exception) -> JSONResponse:
    """The JSON body of every error that reaches a client."""
    assert isinstance(error, HTTPException)
    expected = getattr(error, "expected", {404: ROUTES, 405: ROUTES, 400: "a body that is JSON in UTF-8"}.get(error.status_code))
    body = {"error": str(error.detail), "expected": expected} if expected else {"error": str(error.detail)}
    return JSONResponse(body, error.status_code, error.headers)


def show(value: Any) -> str:
    """What was found, short, and in ASCII: it may hold half a surrogate pair."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def refuse_body(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's findings about a body, as a Refusal."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(p) for p in first["loc"][1:]) or "the body"
    if first["type"] == "json_invalid":
        return refuse(
            None,
            Refusal(
                400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}", 'JSON such as {"inputs": "a text"}'
            ),
        )
    if first["type"] == "missing":
        found = f"{field} is missing" if field != "the body" else "the body is empty"
    elif first["type"] == "extra_forbidden":
        return refuse(
            None, Refusal(422, f"there is no field {field}", "inputs, and top_k for /predict, or k, mode, label and source for /retrieve")
        )
    else:
        found = f"{field}: found {show(first['input'])}"
    expected = (
        'a JSON object such as {"inputs": "a text"}' if field in ("the body", "inputs") else first["msg"].removeprefix("Input should be ")
    )
    return refuse(None, Refusal(422, found, expected))


ITEM = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "text_pair": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}
ONE = {"anyOf": [{"type": "string"}, ITEM]}
# Checked by `read_texts`: pydantic's findings about a union name every branch and help nobody.
Inputs = Annotated[Any, WithJsonSchema({"anyOf": [*ONE["anyOf"], {"type": "array", "items": ONE, "minItems": 1}]})]


class Body(BaseModel):
    """What POST /explain takes."""

    model_config = ConfigDict(extra="forbid")
    inputs: Inputs = Field(description="A text, or {text, text_pair} in pair tasks; or a list of such. A list is answered by a list.")


class Problem(BaseModel):
    """The body of every error."""

    error: str
    expected: str | None = None
    error_id: str | None = Field(None, description="With 500: the id under which the server's log has the cause.")


class PredictBody(Body):
    """What POST /predict takes."""

    top_k: int | None = Field(None, ge=1, strict=True, description="Labels per text; default all.")


class RetrieveBody(Body):
    """What POST /retrieve takes."""

    k: int = Field(8, ge=1, le=100, strict=True, description="Rows of the store per text.")
    mode: Literal["dense", "lexical", "hybrid"] = Field(
        "dense", description="By the student's vectors, by shared words (BM25), or both, apart: {dense, lexical}."
    )
    label: str | None = Field(None, description="Only rows that the teacher gives this label.")
    source: str | None = Field(None, description="Only rows of this source: generated, task, unlabelled or added.")


def read_texts(inputs: Any, pair: bool, args: ServeArgs) -> list[Text]:
    """The texts of a request, spaced as the task's rows were. Raises Refusal 413 or 422 that names the field and what was found."""
    items = inputs if isinstance(inputs, list) else [inputs]
    example = '{"text": "...", "text_pair": "..."}' if pair else '"a text"'
    expected = f"{example}, or a list of such"
    if not items:
        raise Refusal(422, "inputs is an empty list", expected)
    if len(items) > args.max_texts:
        raise Refusal(413, f"inputs holds {len(items)} texts", f"at most {args.max_texts} texts a request")

    def text(value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise Refusal(422, f"{where}: found {show(value)}", expected)
        if len(value) > args.max_text_chars:
            raise Refusal(413, f"{where} has {len(value)} characters", f"at most {args.max_text_chars} characters a text")
        if not value.strip():
            raise Refusal(422, f"{where} is empty", expected)
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise Refusal(422, f"{where} holds half of a surrogate pair: {show(value)}", "text that can be written as UTF-8")
        return tidy(value)

    texts: list[Text] = []
    for i, item in enumerate(items):
        where = f"inputs[{i}]" if isinstance(inputs, list) else "inputs"
        if isinstance(item, dict):
            unknown = sorted(item.keys() - {"text", "text_pair"})
            if unknown:
                raise Refusal(422, f"{where} has the unknown field {show(unknown[0])}", expected)
            first, second, where_first = item.get("text"), item.get("text_pair"), f"{where}.text"
            if "text" not in item:
                raise Refusal(422, f"{where_first} is missing", expected)
        else:
            first, second, where_first = item, None, where
        if pair and second is None and isinstance(first, str):
            raise Refusal(422, f"{where}.text_pair is missing: this task compares two texts", expected)
        if not pair and second is not None:
            raise Refusal(422, f"{where}.text_pair is given, but this task takes single texts", expected)
        texts.append((text(first, where_first), text(second, f"{where}.text_pair") if pair else None))
    return texts


class Guard:
    """ASGI middleware: bounds bodies, insists on JSON, and turns a fault of ours into JSON with an id that the log has too."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app, self.limit = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen, started = 0, False

        async def bounded() -> Message:  # a chunked body has no Content-Length
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                self.too_large(f"more than {self.limit}")
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, bounded, watched)
        except HTTPException as refusal:
            await refuse(None, refusal)(scope, receive, send)
        except Exception:
            code = uuid.uuid4().hex[:12]
            logger.exception(f"error {code} in {scope['method']} {scope['path']}")
            if started:
                raise
            await JSONResponse({"error": "the server failed on this request", "error_id": code}, 500)(scope, receive, send)

    def check(self, scope: Scope) -> None:
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limit:
            self.too_large(length)
        kind = headers.get("content-type", "nothing")
        if scope["method"] == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, f"Content-Type: found {show(kind)}", "application/json")

    def too_large(self, found: str) -> NoReturn:
        raise Refusal(413, f"the body has {found} bytes", f"at most {self.limit} bytes a request")


def build_api(endpoint: Endpoint) -> FastAPI:
    """The routes over one replica."""
    api = FastAPI(title="retrikt", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_middleware(Guard, max_body_bytes=endpoint.args.max_body_bytes)
    api.add_exception_handler(HTTPException, refuse)
    api.add_exception_handler(RequestValidationError, refuse_body)
    problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (400, 413, 415, 422, 500, 503)}
    page = (files("retrikt_ray.serving") / "page.html").read_text(encoding="utf-8")

    @api.post("/predict", responses=problems)
    async def predict(body: PredictBody) -> Any:
        """Labels and scores per text, best first."""
        return await endpoint.answer(
            endpoint.predict_batch, body.inputs, lambda part: [endpoint.scores(a)[: body.top_k] for a in part.answers]
        )

    @api.post("/retrieve", responses=problems)
    async def retrieve(body: RetrieveBody) -> Any:
        """Rows of the store per text: the nearest, those that share most words, or both."""
        return await endpoint.answer(endpoint.retrieve_batch, body.inputs, body)

    @api.post("/explain", responses=problems)
    async def explained(body: Body) -> Any:
        """The prediction, the student's own answer, the rows that voted, and how."""
        return await endpoint.answer(endpoint.predict_batch, body.inputs, endpoint.explanations)

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/info")
    async def info() -> dict[str, Any]:
        limits = {key: getattr(endpoint.args, key) for key in ("max_texts", "max_text_chars", "max_body_bytes")}
        return await endpoint.info() | {"version": __version__, "limits": limits}

    @api.get("/", include_in_schema=False)
    async def front() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    return api
