"""What an operation of the API is, and the description of all of them in OpenAPI's terms."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from retrikt_ray import __version__
from retrikt_ray.serving.api.guard import needed
from retrikt_ray.serving.api.reading import CODES
from retrikt_ray.serving.api.wire import Problem, Strict

Handle = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Operation:
    """A route with one method. Its description is the docstring of what handles it."""

    method: str
    path: str
    handle: Handle
    answer: Any  # type of the JSON of a 200
    body: type[Strict] | None = None
    examples: dict[str, Any] = field(default_factory=dict)
    statuses: tuple[int, ...] = ()  # beside 200, 401 and 500
    parameters: tuple[dict[str, Any], ...] = ()


def openapi(operations: list[Operation]) -> dict[str, Any]:
    """The description of the API."""
    types: dict[Any, TypeAdapter[Any]] = {(op.method, op.path, "answer"): TypeAdapter(op.answer) for op in operations}
    types |= {(op.method, op.path, "body"): TypeAdapter(op.body) for op in operations if op.body} | {"problem": TypeAdapter(Problem)}
    schemas, whole = TypeAdapter.json_schemas(
        [(key, "validation", adapter) for key, adapter in types.items()], ref_template="#/components/schemas/{model}"
    )
    by_key: dict[Any, Any] = {key: schema for (key, _), schema in schemas.items()}
    paths: dict[str, Any] = {}
    for op in operations:
        kind = "text/plain" if op.path == "/metrics" else "application/json"
        responses = {"200": {"description": "The answer.", "content": {kind: {"schema": by_key[op.method, op.path, "answer"]}}}}
        for status in sorted({*op.statuses, 500, *([401] if needed(op.method, op.path) else [])}):
            responses[str(status)] = {"description": CODES[status], "content": {"application/json": {"schema": by_key["problem"]}}}
        text = op.handle.__doc__ or ""
        name = op.path.strip("/").replace("/", "_") or "inference"
        described: dict[str, Any] = {
            "operationId": name if op.method in ("GET", "POST") else f"{op.method.lower()}_{name}",
            "summary": text.partition(".")[0].partition(":")[0],
            "description": text,
            "responses": responses,
        }
        if op.parameters:
            described["parameters"] = list(op.parameters)
        if op.body:
            content = {"schema": by_key[op.method, op.path, "body"], "examples": {k: {"value": v} for k, v in op.examples.items()}}
            described["requestBody"] = {"required": op.method != "DELETE", "content": {"application/json": content}}
        if needed(op.method, op.path):
            described["security"] = [{"key": []}, {}]
        paths.setdefault(op.path, {})[op.method.lower()] = described
    scheme = {"key": {"type": "http", "scheme": "bearer", "description": "A key, where the server has keys; edits need a write key."}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "retrikt", "version": __version__},
        "paths": paths,
        "components": {"schemas": whole["$defs"], "securitySchemes": scheme},
    }
