"""What is answered where no replica does: as pages of HAProxy, and, in Ray's own proxy, in place of what it says.

Ray's proxy takes what this gives it where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares`, as the image of `cluster/` does: by
itself it answers 500 where a replica was lost with a request, and in plain text where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, NamedTuple

from retrikt_ray.serving.api.wire import INTERRUPTED

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
AGAIN = "the same request a second later"


class Fault(NamedTuple):
    """Why there is no answer, with when to come again."""

    error: str
    code: str
    expected: str
    status: int = 503

    def body(self) -> bytes:
        return json.dumps({"error": self.error, "code": self.code, "expected": self.expected}).encode() + b"\n"

    def headers(self) -> list[tuple[bytes, bytes]]:
        found = {
            "content-type": "application/json",
            "content-length": str(len(self.body())),
            "cache-control": "no-store",
            "retry-after": "1",
        }
        return [(name.encode(), value.encode()) for name, value in found.items()]

    def page(self) -> bytes:
        """The answer as it goes over the wire, once."""
        head = b"".join(b"%s: %s\r\n" % header for header in self.headers())
        return f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n".encode() + head + b"connection: close\r\n\r\n" + self.body()


LOST = Fault("the replica ended while it worked on this", INTERRUPTED, f"{AGAIN}; an edit may have been made")
NOBODY = Fault("no replica could be reached", "overloaded", AGAIN)
LATE = Fault("the replica has not answered in time", INTERRUPTED, f"{AGAIN}; an edit may have been made")


class Front:
    """ASGI around Ray's proxy."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        head: Message | None = None
        sent, fault = False, LOST  # Ray's proxy ends without a word where the replica was lost

        async def sift(message: Message) -> None:
            nonlocal head, sent, fault
            if message["type"] == "http.response.start":
                head, fault = message, its_own(message) or LOST
            elif fault is LOST and head is not None:
                if not sent:  # a head without a body is no answer
                    await send(head)
                sent = True
                await send(message)

        await self.app(scope, receive, sift)
        if not sent:
            await send({"type": "http.response.start", "status": fault.status, "headers": fault.headers()})
            await send({"type": "http.response.body", "body": fault.body()})


def its_own(start: Message) -> Fault | None:
    """What a response of Ray's proxy means that is its own: in plain text, as no replica writes errors."""
    plain = any(name.lower() == b"content-type" and value.startswith(b"text/plain") for name, value in start["headers"])
    return {503: NOBODY, 408: LATE}.get(start["status"]) if plain else None


def middlewares() -> list[Any]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    from starlette.middleware import Middleware

    return [Middleware(Front)]
