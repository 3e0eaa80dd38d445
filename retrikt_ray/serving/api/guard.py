"""What stands between a request and the routes: keys, sizes, time to send, ids, and how every fault is told.

Nothing that a user sent goes to the log: of a fault of ours it gets the place, and the message only of errors that speak of our own files.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrikt_ray.runtime.folders import ArtifactError
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.api.reading import CODES, Refusal
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.task.texts import short

LEVELS = {"nothing": 0, "read": 1, "write": 2}  # what a request may do
PUBLIC = {"/", "/docs", "/health", "/ready", "/openapi.json"}  # for GET: they say nothing of what the server knows
ENVIRONMENT = {"read": "RETRIKT_READ_KEYS", "write": "RETRIKT_WRITE_KEYS"}
SHORTEST_KEY = 16
HEADERS = [  # of every answer
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
logger = logging.getLogger("ray.serve")  # Serve writes it to the replica's log file


@dataclass(frozen=True)
class Keys:
    """Who may read and write: digests of keys, and what may be done without one."""

    read: tuple[bytes, ...]
    write: tuple[bytes, ...]
    open: int  # one of LEVELS

    @staticmethod
    def load(args: ServeArgs) -> Keys:
        """From the environment and `keys_file`. Raises ConfigError on a bad key, and where there is none and nothing is said to be open."""
        found: dict[str, list[str]] = {kind: re.split(r"[\s,]+", os.environ.get(name, "").strip()) for kind, name in ENVIRONMENT.items()}
        if args.keys_file:
            try:
                lines = Path(args.keys_file).read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise ConfigError(f"keys_file: {args.keys_file} cannot be read: {error.strerror}") from None
            for number, line in enumerate(lines, 1):
                words = line.partition("#")[0].split()
                if words and (len(words) != 2 or words[0] not in found):
                    raise ConfigError(f"{args.keys_file}, line {number}: expected `read KEY` or `write KEY`")
                if words:
                    found[words[0]].append(words[1])
        keys = {kind: [key for key in some if key] for kind, some in found.items()}
        for kind, some in keys.items():
            if any(len(key) < SHORTEST_KEY for key in some):
                raise ConfigError(f"a {kind} key is shorter than {SHORTEST_KEY} characters; `openssl rand -hex 24` makes a good one")
        if not any(keys.values()) and args.open is None:
            raise ConfigError(
                f"there are no keys: give {' and '.join(ENVIRONMENT.values())}, or keys_file=FILE; or say open=read (or open=write) where "
                "everybody who reaches this server may read (or write)"
            )
        digests = {kind: tuple(digest(key) for key in some) for kind, some in keys.items()}
        return Keys(digests["read"], digests["write"], LEVELS[args.open or "nothing"])

    def check(self, header: str, needed: int) -> None:
        """Raises Refusal 401 or 403 where the Authorization header does not allow what is needed."""
        if self.open >= needed:
            return
        kind, _, key = header.partition(" ")
        given = digest(key.strip())
        level = self.open
        for one, some in ((1, self.read), (2, self.write)):
            for known in some:  # each is compared, and in constant time
                level = max(level, one * hmac.compare_digest(given, known))
        if kind.lower() == "bearer" and level >= needed:
            return
        if kind.lower() == "bearer" and level > self.open:
            raise Refusal(403, "this key may read, and not write", "a write key")
        need = "a write key" if needed == 2 else "a key"
        raise Refusal(
            401,
            "the key is not known" if header else "there is no key",
            f"Authorization: Bearer, and {need}",
            {"WWW-Authenticate": "Bearer"},
        )


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def needed(method: str, path: str) -> int:
    """Which of LEVELS a request needs."""
    if method in ("GET", "HEAD") and path in PUBLIC:
        return 0
    return LEVELS["write" if path.startswith("/knowledge") and method not in ("GET", "HEAD") else "read"]


def refuse(error: HTTPException) -> JSONResponse:
    """The JSON body of every error that reaches a client."""
    body = {"error": str(error.detail), "code": CODES.get(error.status_code, "refused")}
    expected = getattr(error, "expected", "a route and method of /openapi.json" if error.status_code in (404, 405) else None)
    return JSONResponse(body | ({"expected": expected} if expected else {}), error.status_code, error.headers)


def told(error: BaseException) -> str:
    """An error for the log: where it was, and its message if that speaks of our own files."""
    parts: Iterable[BaseException] = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
    lines = []
    for part in parts:
        message = f": {part}" if isinstance(part, ArtifactError | OSError) else ""
        lines += ["".join(traceback.format_tb(part.__traceback__)) + type(part).__name__ + message]
    return "\n".join(lines)


class Guard:
    """ASGI middleware over the routes. echo: whether it tells the id of a request; Serve does so itself."""

    def __init__(self, app: ASGIApp, args: ServeArgs, keys: Keys, echo: bool = True) -> None:
        self.app, self.limit, self.deadline, self.keys, self.echo = app, args.max_body_bytes, args.deadline_s, keys, echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        code = given if ID.fullmatch(given) else secrets.token_hex(16)
        seen, started, until = 0, False, time.monotonic() + self.deadline

        async def bounded() -> Message:  # a chunked body has no Content-Length
            nonlocal seen
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, f"the body has not come within {self.deadline:g} s", "a body that is sent at once") from None
            seen += len(message.get("body", b""))
            if seen > self.limit:
                self.too_large(f"more than {self.limit}")
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *HEADERS, *([(b"x-request-id", code.encode())] if self.echo else [])]
            await send(message)

        scope["app"] = self  # Starlette's sign that somebody above writes its refusals
        try:
            self.check(scope, headers)
            await self.app(scope, bounded, watched)
        except HTTPException as refusal:
            await refuse(refusal)(scope, receive, watched)
        except Exception as error:
            logger.error(f"error {code} in {scope['method']} {route_of(scope)}\n{told(error)}")
            if started:
                raise
            body = {"error": "the server failed on this request", "code": CODES[500], "error_id": code}
            await JSONResponse(body, 500)(scope, receive, watched)

    def check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        method, path = scope["method"], route_of(scope)
        self.keys.check(headers.get(b"authorization", b"").decode("latin-1"), needed(method, path))
        length = headers.get(b"content-length", b"0").decode("latin-1")
        if length.isdecimal() and int(length) > self.limit:
            self.too_large(length)
        kind = headers.get(b"content-type", b"nothing").decode("latin-1")
        takes_body = method == "POST" or (path == "/knowledge" and (method == "PUT" or length != "0"))
        if takes_body and kind.partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, f"Content-Type: found {short(kind)}", "application/json")

    def too_large(self, found: str) -> NoReturn:
        raise Refusal(413, f"the body has {found} bytes", f"at most {self.limit} bytes a request")


def route_of(scope: Scope) -> str:
    """The path below the prefix that the app is served under."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(prefix) :] or "/" if prefix and path.startswith(prefix) else path
