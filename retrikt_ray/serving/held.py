"""Runs that a replica answers from beside its own: opened when they are asked for, and held as Serve's multiplexing decides.

Serve also sends a request to a replica that has its run open.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from copy import copy
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.api.routes import routes_of
from retrikt_ray.serving.api.several import unknown
from retrikt_ray.serving.replica import Endpoint

AGAIN_S = 30.0  # after which it is tried again to open a run that could not be opened
GRACE_S = 0.1  # in which a request that was just given a run has begun with it


class Held:
    """The app of one such run. Serve calls `__del__` when it makes room for another, which it opens then."""

    def __init__(self, run: Folder, name: str, own: Endpoint) -> None:
        """Raises ArtifactError and ConfigError as Predictor does."""
        args = own.args.model_copy(update={"run": run.uri, "runs": None, "shard_groups": 0})
        self.endpoint = Endpoint(args.model_dump(), metrics=copy(own.metrics).of(name), process=own.process)
        self.app, self.asked, self.deadline_s = routes_of(self.endpoint), 0, own.args.deadline_s
        self.closing = threading.Lock()  # taken by the first that does

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.asked -= 1

    def __del__(self) -> None:
        """Wait for what it is asked, within the deadline, and give up the run: no more are open than were promised."""
        if not hasattr(self, "closing") or not self.closing.acquire(blocking=False):  # it was not opened; it is closed
            return
        until = time.monotonic() + self.deadline_s
        time.sleep(GRACE_S)
        while self.asked and time.monotonic() < until:
            time.sleep(0.01)
        self.endpoint.close()


def several(own: Endpoint, runs: Folder) -> Callable[[str], Awaitable[ASGIApp]]:
    """The app of a run in this folder by its name. Raises Refusal 404 where there is none, 503 where it cannot be opened."""
    from ray import serve

    async def held(name: str) -> Held:
        return await asyncio.to_thread(Held, runs / name, name, own)

    multiplexed = serve.multiplexed(max_num_models_per_replica=own.args.runs_held)(held)
    known: set[str] = set()  # that are or were there: it is not asked of the object store for each request
    broken: dict[
        str, tuple[float, str]
    ] = {}  # until when, and why: Serve makes room before it opens a run, so it is not tried for each request

    async def hold(name: str) -> ASGIApp:
        until, why = broken.get(name, (0.0, ""))
        if time.monotonic() > until:
            try:
                if name not in known and not await asyncio.to_thread((runs / name / "student").exists, MANIFEST):
                    raise unknown(name)
                known.add(name)
                found: Held = await multiplexed(name)
                return found
            except (ArtifactError, ConfigError, OSError) as error:
                why = str(error)
                for place in (runs.uri, str(Path(runs.uri).resolve())):
                    why = why.replace(place, "runs")
                broken[name] = (time.monotonic() + AGAIN_S, why)
        raise Refusal(503, f"the run {name} cannot be opened: {why}", "a whole run", {"Retry-After": f"{AGAIN_S:.0f}"})

    return hold
