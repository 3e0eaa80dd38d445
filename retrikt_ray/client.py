"""A typed client of a served run, for plain code and for asyncio.

    with Client("http://127.0.0.1:8000") as client:
        client.predict(["a fine film"])[0][0].label

A server that is too busy says when to come again (429 or 503 with Retry-After), and the client does, as long as its time lasts. So it does where
no connection came about or one broke, unless the call was an edit that must not be made twice. The types of answers are the server's own.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, Literal, Self, TypeVar

import httpx2 as httpx
from pydantic import TypeAdapter

from retrikt_ray.serving.api.wire import INTERRUPTED, RUN_HEADER, Edited, Explanation, Found, Info, Listing, Preview, Scores, Sides

URL = "http://127.0.0.1:8000"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # before a try where the server has not said when; doubled each time

T = TypeVar("T")
Outcome = httpx.Response | httpx.TransportError
Mode = Literal["dense", "lexical"]
Item = str | tuple[str, str]  # a text, or the two texts of a pair task


class ServerError(Exception):
    """The server refused, or could not be reached: then `status` is 0."""

    def __init__(self, message: str, status: int = 0, code: str = "unreachable", expected: str | None = None) -> None:
        super().__init__(message + (f"; expected: {expected}" if expected else ""))
        self.status, self.code, self.expected = status, code, expected


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call, and how its answer is read."""

    method: str
    path: str
    answer: Any  # type of the JSON
    body: Any = None
    query: dict[str, Any] = field(default_factory=dict)
    version: str | None = None  # that an edit is made for
    once: bool = False  # an edit that would be refused, or do something else, if it had been made already

    def read(self, outcome: Outcome) -> T:
        """The answer. Raises ServerError."""
        if isinstance(outcome, httpx.TransportError):
            raise ServerError(f"{self.path}: {outcome or type(outcome).__name__}") from outcome
        if outcome.status_code != 200:
            problem = problem_of(outcome)
            message = f"{self.path} answered {outcome.status_code}: {problem.get('error', outcome.text.strip() or 'no reason given')}"
            raise ServerError(message, outcome.status_code, str(problem.get("code", "refused")), problem.get("expected"))
        try:
            found: T = reader(self.answer).validate_json(outcome.content)
            return found
        except ValueError as error:
            raise ServerError(f"{self.path} answered with something else than retrikt does: {error}", 200, "unreadable") from error

    def pause(self, outcome: Outcome, tries: int) -> float | None:
        """Seconds until the call is worth another try; None: it is not. tries: that were made."""
        pause: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1)) * random.uniform(0.5, 1)
        if isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout):
            return pause
        if isinstance(outcome, httpx.NetworkError | httpx.RemoteProtocolError):
            return None if self.once else pause
        if isinstance(outcome, httpx.TransportError) or outcome.status_code not in (429, 503):
            return None
        if self.once and problem_of(outcome).get("code") == INTERRUPTED:
            return None
        said = outcome.headers.get("retry-after", "")
        return float(said) if said.isdecimal() else pause


@lru_cache
def reader(answer: Any) -> TypeAdapter[Any]:
    return TypeAdapter(answer)


def problem_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an error; empty where it was not written by a replica but by something on the way."""
    try:
        problem = response.json()
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def inputs(items: Sequence[Item]) -> list[Any]:
    if isinstance(items, str):
        raise TypeError("expected a list of texts, found one str")
    return [item if isinstance(item, str) else {"text": item[0], "text_pair": item[1]} for item in items]


class Calls:
    """What can be asked of a server. `Client` and `AsyncClient` send it."""

    @staticmethod
    def predict(texts: Sequence[Item], top_k: int | None = None) -> Call[list[Scores]]:
        return Call("POST", "/predict", list[Scores], {"inputs": inputs(texts), "top_k": top_k})

    @staticmethod
    def embed(texts: Sequence[Item]) -> Call[list[list[float]]]:
        return Call("POST", "/embed", list[list[float]], {"inputs": inputs(texts)})

    @staticmethod
    def retrieve(texts: Sequence[Item], k: int, mode: str, label: str | None, source: str | None) -> Call[list[list[Found]]]:
        return Call(
            "POST", "/retrieve", list[list[Found]], {"inputs": inputs(texts), "k": k, "mode": mode, "label": label, "source": source}
        )

    @staticmethod
    def retrieve_both(texts: Sequence[Item], k: int, label: str | None, source: str | None) -> Call[list[Sides]]:
        body = {"inputs": inputs(texts), "k": k, "mode": "hybrid", "label": label, "source": source}
        return Call("POST", "/retrieve", list[Sides], body)

    @staticmethod
    def explain(texts: Sequence[Item]) -> Call[list[Explanation]]:
        return Call("POST", "/explain", list[Explanation], {"inputs": inputs(texts)})

    @staticmethod
    def info() -> Call[Info]:
        return Call("GET", "/info", Info)

    @staticmethod
    def listing(q: str, label: str | None, source: str | None, offset: int, limit: int) -> Call[Listing]:
        query = {"q": q or None, "label": label, "source": source, "offset": offset, "limit": limit}
        return Call("GET", "/knowledge", Listing, query={name: value for name, value in query.items() if value is not None})

    @staticmethod
    def put(rows: Sequence[dict[str, Any]], version: str | None) -> Call[Edited]:
        return Call("PUT", "/knowledge", Edited, {"rows": list(rows)}, version=version, once=version is not None)

    @staticmethod
    def delete(ids: Sequence[str], version: str | None) -> Call[Edited]:
        return Call("DELETE", "/knowledge", Edited, {"ids": list(ids)}, version=version, once=True)

    @staticmethod
    def preview(texts: Sequence[Item], rows: Sequence[dict[str, Any]], ids: Sequence[str]) -> Call[Preview]:
        return Call("POST", "/knowledge/preview", Preview, {"inputs": inputs(texts), "rows": list(rows), "ids": list(ids)})


def headers_of(key: str | None, run: str | None) -> dict[str, str]:
    return ({"Authorization": f"Bearer {key}"} if key else {}) | ({RUN_HEADER: run} if run else {})


class Client:
    """Calls a server. Methods that take texts take a list, and give one answer per text, in order. Threads may share it."""

    def __init__(self, url: str = URL, key: str | None = None, timeout_s: float = 30.0, run: str | None = None, **more: Any) -> None:
        """key: where the server needs one; timeout_s: of a call with all its tries; run: by name, another than the server's own; more: for httpx.Client."""
        self.timeout_s = timeout_s
        self.http = httpx.Client(base_url=url.rstrip("/"), headers=headers_of(key, run), **more)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self.http.close()

    def predict(self, texts: Sequence[Item], top_k: int | None = None) -> list[Scores]:
        """Labels and scores of each text, best first; in regression LABEL_0 and the value."""
        return self.send(Calls.predict(texts, top_k))

    def embed(self, texts: Sequence[Item]) -> list[list[float]]:
        """The query vectors, of unit length."""
        return self.send(Calls.embed(texts))

    def retrieve(
        self, texts: Sequence[Item], k: int = 8, mode: Mode = "dense", label: str | None = None, source: str | None = None
    ) -> list[list[Found]]:
        """The k nearest rows of the knowledge, or the k that share most words; label, source: only such rows."""
        return self.send(Calls.retrieve(texts, k, mode, label, source))

    def retrieve_both(self, texts: Sequence[Item], k: int = 8, label: str | None = None, source: str | None = None) -> list[Sides]:
        """k rows found by vectors and k found by words, apart."""
        return self.send(Calls.retrieve_both(texts, k, label, source))

    def explain(self, texts: Sequence[Item]) -> list[Explanation]:
        """Predictions, what they rest on, and what they would be without it."""
        return self.send(Calls.explain(texts))

    def info(self) -> Info:
        """What is served."""
        return self.send(Calls.info())

    def listing(self, q: str = "", label: str | None = None, source: str | None = None, offset: int = 0, limit: int = 50) -> Listing:
        """Rows of the knowledge, newest first. q: words that they hold."""
        return self.send(Calls.listing(q, label, source, offset, limit))

    def put(self, rows: Sequence[dict[str, Any]], version: str | None = None) -> Edited:
        """Add rows {text, text_pair?, label?, id?}, or put them in place of those that have their ids. version: that this is meant for."""
        return self.send(Calls.put(rows, version))

    def delete(self, ids: Sequence[str], version: str | None = None) -> Edited:
        """Delete rows, all or none."""
        return self.send(Calls.delete(ids, version))

    def preview(self, texts: Sequence[Item], rows: Sequence[dict[str, Any]] = (), ids: Sequence[str] = ()) -> Preview:
        """The answers to texts as they are, and as they would be with these rows put and these ids deleted."""
        return self.send(Calls.preview(texts, rows, ids))

    def send(self, call: Call[T]) -> T:
        """The answer to a call, after as many tries as its time allows. Raises ServerError."""
        until, tries = time.monotonic() + self.timeout_s, 0
        while True:
            left = until - time.monotonic()
            outcome: Outcome
            try:
                outcome = self.http.request(**request_of(call, left))
            except httpx.TransportError as error:
                outcome = error
            pause = call.pause(outcome, tries := tries + 1)
            if pause is None or time.monotonic() + pause > until:
                return call.read(outcome)
            time.sleep(pause)


def request_of(call: Call[Any], timeout_s: float) -> dict[str, Any]:
    match = {} if call.version is None else {"If-Match": f'"{call.version}"'}
    return {"method": call.method, "url": call.path, "json": call.body, "params": call.query, "headers": match, "timeout": timeout_s}


class AsyncClient:
    """As `Client`, for asyncio: each method is awaited."""

    def __init__(self, url: str = URL, key: str | None = None, timeout_s: float = 30.0, run: str | None = None, **more: Any) -> None:
        """As for `Client`; more: for httpx.AsyncClient."""
        self.timeout_s = timeout_s
        self.http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers_of(key, run), **more)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self.http.aclose()

    async def predict(self, texts: Sequence[Item], top_k: int | None = None) -> list[Scores]:
        return await self.send(Calls.predict(texts, top_k))

    async def embed(self, texts: Sequence[Item]) -> list[list[float]]:
        return await self.send(Calls.embed(texts))

    async def retrieve(
        self, texts: Sequence[Item], k: int = 8, mode: Mode = "dense", label: str | None = None, source: str | None = None
    ) -> list[list[Found]]:
        return await self.send(Calls.retrieve(texts, k, mode, label, source))

    async def retrieve_both(self, texts: Sequence[Item], k: int = 8, label: str | None = None, source: str | None = None) -> list[Sides]:
        return await self.send(Calls.retrieve_both(texts, k, label, source))

    async def explain(self, texts: Sequence[Item]) -> list[Explanation]:
        return await self.send(Calls.explain(texts))

    async def info(self) -> Info:
        return await self.send(Calls.info())

    async def listing(self, q: str = "", label: str | None = None, source: str | None = None, offset: int = 0, limit: int = 50) -> Listing:
        return await self.send(Calls.listing(q, label, source, offset, limit))

    async def put(self, rows: Sequence[dict[str, Any]], version: str | None = None) -> Edited:
        return await self.send(Calls.put(rows, version))

    async def delete(self, ids: Sequence[str], version: str | None = None) -> Edited:
        return await self.send(Calls.delete(ids, version))

    async def preview(self, texts: Sequence[Item], rows: Sequence[dict[str, Any]] = (), ids: Sequence[str] = ()) -> Preview:
        return await self.send(Calls.preview(texts, rows, ids))

    async def send(self, call: Call[T]) -> T:
        """The answer to a call, after as many tries as its time allows. Raises ServerError."""
        until, tries = time.monotonic() + self.timeout_s, 0
        while True:
            left = until - time.monotonic()
            outcome: Outcome
            try:
                outcome = await self.http.request(**request_of(call, left))
            except httpx.TransportError as error:
                outcome = error
            pause = call.pause(outcome, tries := tries + 1)
            if pause is None or time.monotonic() + pause > until:
                return call.read(outcome)
            await asyncio.sleep(pause)
