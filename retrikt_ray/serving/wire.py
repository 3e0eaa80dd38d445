"""The HTTP side of serving: what a request may look like, and how it is refused.

Shapes follow Hugging Face's text-classification: one text is answered by a list of {label, score}, a list of texts by a list of such.
Every error is JSON that says what was found and what was expected.
"""

from __future__ import annotations

import logging
import uuid
from typing import Annotated, Any, Literal, NoReturn

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.task.texts import TEXT_COLUMNS, Text, TextError, read_texts, short

ROUTES = "GET /, /health, /info, /openapi.json; POST /predict, /retrieve, /explain"
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
            None,
            Refusal(422, f"there is no field {short(field)}", "inputs, and top_k for /predict, or k, mode, label and source for /retrieve"),
        )
    else:
        found = f"{field}: found {short(first['input'])}"
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
# Checked by `texts_of_inputs`: pydantic's findings about a union name every branch and help nobody.
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


def texts_of_inputs(inputs: Any, pair: bool, args: ServeArgs) -> list[Text]:
    """The texts of a request. Raises Refusal 413 or 422 that names the field and what was found."""
    items = inputs if isinstance(inputs, list) else [inputs]
    if len(items) > args.max_texts:
        raise Refusal(413, f"inputs holds {len(items)} texts", f"at most {args.max_texts} texts a request")
    for i, item in enumerate(items):
        where = f"inputs[{i}]" if isinstance(inputs, list) else "inputs"
        parts = {f"{where}.{key}": item.get(key) for key in TEXT_COLUMNS} if isinstance(item, dict) else {where: item}
        for name, value in parts.items():
            if isinstance(value, str) and len(value) > args.max_text_chars:
                raise Refusal(413, f"{name} has {len(value)} characters", f"at most {args.max_text_chars} characters a text")
    try:
        return read_texts(inputs, pair, "inputs")
    except TextError as error:
        a_text = error.expected.startswith("a ")
        raise Refusal(422, error.found, f"{error.expected}, or a list of such" if a_text else error.expected) from None
    except RecursionError:  # it could just be parsed, but not be shown
        raise Refusal(422, "inputs is nested too deeply", "a text, or a list of such") from None


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
            raise Refusal(415, f"Content-Type: found {short(kind)}", "application/json")

    def too_large(self, found: str) -> NoReturn:
        raise Refusal(413, f"the body has {found} bytes", f"at most {self.limit} bytes a request")
