"""From the bytes of a body to its type and its texts, and how what cannot be read is refused.

Bodies are parsed here and not by a web framework, where half the time of a small request would go.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.exceptions import HTTPException

from retrikt_ray.serving.api.wire import Body, Parameters, PreviewBody, Strict
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.task.texts import TEXT_COLUMNS, Text, TextError, read_texts, short

CODES = {  # what a status means here, as a word that programs can rely on
    400: "bad_json",
    401: "wrong_key",
    403: "not_allowed",
    404: "not_found",
    405: "wrong_method",
    408: "slow_request",
    412: "version_differs",
    413: "too_large",
    415: "wrong_type",
    422: "invalid",
    500: "failed",
    503: "overloaded",
    504: "deadline",
}


class Refusal(HTTPException):
    """An answer other than 200, as JSON: what was wrong and what was expected."""

    def __init__(self, status: int, error: str, expected: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, error, headers)
        self.expected = expected


Model = TypeVar("Model", bound=Strict)


def read_body(raw: bytes, model: type[Model]) -> Model:
    """A body as its type. Raises Refusal 400 or 422 that says what was found."""
    example = 'JSON such as {"inputs": "a text"}' if "inputs" in model.model_fields else "JSON"
    if not raw:
        raise Refusal(422, "the body is empty", f"a {example}" if example == "JSON" else example.replace("JSON", "a JSON object"))
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error.msg} at character {error.pos}", example) from None
    except (UnicodeDecodeError, RecursionError, ValueError):  # ValueError: a number of more digits than Python reads
        raise Refusal(400, "the body cannot be parsed", "JSON in UTF-8, not nested too deeply") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    try:
        found = short(first["input"])
    except RecursionError:  # it could just be parsed, but not be shown
        found = "what is nested too deeply"
    field = ".".join(str(p) for p in first["loc"]) or "the body"
    object_of = 'a JSON object such as {"inputs": "a text"}' if example != "JSON" else f"a JSON object of {', '.join(model.model_fields)}"
    if first["type"] == "missing":
        raise Refusal(422, f"{field} is missing", object_of)
    if first["type"] == "extra_forbidden":
        known = ", ".join(Parameters.model_fields if field.startswith("parameters.") else model.model_fields)
        raise Refusal(422, f"there is no field {short(field)}", known)
    wrong_shape = field == "the body" or first["type"] in ("model_type", "invalid_key")
    raise Refusal(422, f"{field}: found {found}", object_of if wrong_shape else first["msg"].removeprefix("Input should be "))


def texts_of_inputs(body: Body | PreviewBody, pair: bool, args: ServeArgs) -> tuple[list[Text], bool]:
    """The texts of a request, and whether it is a list of them. Raises Refusal 413 or 422 that names the field and what was found."""
    inputs, cut = body.inputs, isinstance(body, Body) and bool(body.truncate)
    if pair and isinstance(inputs, list) and len(inputs) == 2 and all(isinstance(side, str) for side in inputs):
        inputs = tuple(inputs)  # as TEI has it; two texts cannot be meant in a task of pairs
    many = isinstance(inputs, list)
    if many and len(inputs) > args.max_texts:
        raise Refusal(413, f"inputs holds {len(inputs)} texts", f"at most {args.max_texts} texts a request")
    items = [one(item) if many else item for item in (inputs if many else [inputs])]
    for i, item in enumerate(items):
        if isinstance(item, str) and len(item) <= args.max_text_chars:  # nearly always
            continue
        items[i] = bounded(item, f"inputs[{i}]" if many else "inputs", args.max_text_chars, cut)
    try:
        return read_texts(items if many else items[0], pair, "inputs"), many
    except TextError as error:
        a_text = error.expected.startswith("a ")
        raise Refusal(422, error.found, f"{error.expected}, or a list of such" if a_text else error.expected) from None
    except RecursionError:  # it could just be parsed, but not be shown
        raise Refusal(422, "inputs is nested too deeply", "a text, or a list of such") from None


def one(item: Any) -> Any:
    """A text of a list: TEI writes ["text"] and ["text", "second text"]."""
    if isinstance(item, list) and 1 <= len(item) <= 2 and all(isinstance(side, str) for side in item):
        return item[0] if len(item) == 1 else tuple(item)
    return item


def bounded(item: Any, where: str, most: int, cut: bool) -> Any:
    """An item whose texts are not longer than `most` characters: cut, or else a Refusal 413."""

    def side(value: Any, where: str) -> Any:
        if not isinstance(value, str) or len(value) <= most:
            return value
        if not cut:
            raise Refusal(413, f"{where} has {len(value)} characters", f'at most {most} characters a text, or "truncate": true')
        return value[:most]

    if isinstance(item, dict):
        return item | {key: side(item[key], f"{where}.{key}") for key in TEXT_COLUMNS if key in item}
    if isinstance(item, tuple):
        return tuple(side(value, f"{where}.{key}") for key, value in zip(TEXT_COLUMNS, item, strict=True))
    return side(item, where)
