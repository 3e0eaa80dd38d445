"""Which run a request is for: the server's own, or one that it names by the header that Ray Serve has for multiplexed models."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from retrikt_ray.serving.api.guard import needed, route_of
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.api.wire import RUN_HEADER
from retrikt_ray.task.texts import short

PARAMETER = {
    "name": RUN_HEADER,
    "in": "header",
    "schema": {"type": "string"},
    "description": "Name of the run to answer from, of those beside the server's own; left out: its own.",
}
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)  # a folder's name, and no way out of the folder that it is in


def named(scope: Scope) -> str | None:
    """The run that a request names; None: the server's own, as for everything that needs no key. Raises Refusal 404 on what can be no name."""
    if scope["type"] != "http" or not needed(scope["method"], route_of(scope)):
        return None
    name = next((v.decode("latin-1") for k, v in scope["headers"] if k.lower().replace(b"-", b"_") == RUN_HEADER.encode()), None)
    if name and not NAME.fullmatch(name):
        raise unknown(name)
    return name or None


def unknown(name: str) -> Refusal:
    return Refusal(404, f"{RUN_HEADER}: there is no run {short(name)}", "the name of a run that is served here, or no such header")


class Several:
    """ASGI app over the app of the server's own run and those of others."""

    def __init__(self, own: ASGIApp, hold: Callable[[str], Awaitable[ASGIApp]], deadline_s: float) -> None:
        """hold: the app of a run by its name, opened if need be. Raises Refusal where there is none or it cannot be opened."""
        self.own, self.hold, self.deadline_s = own, hold, deadline_s
        self.opening: dict[str, asyncio.Future[ASGIApp]] = {}  # whoever asks for a run meanwhile waits for the same

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = named(scope)
        app = self.own if name is None else await self.held(name)
        await app(scope, receive, send)

    async def held(self, name: str) -> ASGIApp:
        opening = self.opening.get(name)
        if opening is None:
            opening = self.opening[name] = asyncio.ensure_future(self.hold(name))
            opening.add_done_callback(lambda _: self.opening.pop(name))
        try:
            async with asyncio.timeout(self.deadline_s):
                return await asyncio.shield(opening)  # it goes on for those who ask again
        except TimeoutError:
            raise Refusal(503, f"the run {name} is being opened", "the same request some seconds later", {"Retry-After": "2"}) from None
