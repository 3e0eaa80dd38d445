"""Shards as deployments of their own, which all replicas of the student ask: each holds its part of the index once, not once a replica."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from retrikt_ray.index.search import Searcher
from retrikt_ray.index.spread import Found, Gone, Spread
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.args import ServeArgs

HELD = 2  # indexes that a group has open: that of a run, and that of the one that takes its place
OPEN_S = 600.0  # for a group to find a place on the cluster, and to fetch and verify its shards

Held = tuple[str, str]  # an index: its folder, and what its manifest has of its content


class ShardGroup:
    """One of several groups into which the shards of an index are split: the Serve deployment `Shards0`, `Shards1`, ...

    It opens an index when it is asked about it, and so after a restart, too.
    """

    def __init__(self, number: int, groups: int, threads: int) -> None:
        self.number, self.groups, self.threads = number, groups, threads
        self.searchers: dict[Held, Searcher] = {}  # that which was asked for last is the last
        self.opening = threading.Lock()

    async def open(self, index: Held) -> None:
        """Open this group's shards of an index, and verify them. Raises ArtifactError."""
        await asyncio.to_thread(self.opened, index)

    async def once(self, index: Held, queries: np.ndarray, k: int, allowed: np.ndarray | None, everywhere: bool) -> Found:
        """As `Searcher.once`. allowed: (rows,) bool, packed. Raises ArtifactError."""
        return await asyncio.to_thread(self.found, index, queries, k, allowed, everywhere)

    def found(self, index: Held, queries: np.ndarray, k: int, allowed: np.ndarray | None, everywhere: bool) -> Found:
        rows = None if allowed is None else np.unpackbits(allowed).view(bool)  # with up to seven behind the last
        return (self.searchers.get(index) or self.opened(index)).once(queries, k, rows, everywhere)

    def opened(self, index: Held) -> Searcher:
        with self.opening:
            found = self.searchers.pop(index, None) or self.searcher(index)
            self.searchers = dict([*self.searchers.items(), (index, found)][-HELD:])
        return found

    def searcher(self, index: Held) -> Searcher:
        folder, content = Folder.at(index[0]), index[1]
        files = [shard["file"] for shard in folder.read_json("index.json")["shards"]]
        own = np.array_split(files, self.groups)[self.number].tolist()  # neighbours together
        searcher = Searcher.open(folder, self.threads, only=own)
        if check(folder, only=[]).content != content:
            raise ArtifactError(f"{folder} was made anew since it was opened: open the run again")
        return searcher


class Asked:
    """A question to a group, on its way."""

    def __init__(self, response: Any) -> None:
        self.response = response

    def result(self, timeout_s: float) -> Any:
        """Raises TimeoutError, Gone, and what the group raised."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return self.response.result(timeout_s=timeout_s)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise Gone(str(error)) from None


def spread(groups: Sequence[Any], args: ServeArgs, index: Folder) -> Spread:
    """An index that the deployments of `build_app` hold, opened by all of them. groups: their handles.

    Raises ArtifactError, and ConfigError where a group finds no place.
    """
    held = (index.uri, check(index, only=[]).content)
    card = index.read_json("index.json")
    for number, opening in enumerate([Asked(group.open.remote(held)) for group in groups]):
        try:
            opening.result(OPEN_S)
        except (TimeoutError, Gone) as error:
            raise ConfigError(
                f"Shards{number} has not opened its part of {index} in {OPEN_S:g} s: {str(error) or 'no place on the cluster?'}"
            ) from None

    def asking(group: Any) -> Any:
        def ask(queries: np.ndarray, k: int, allowed: np.ndarray | None, everywhere: bool) -> Asked:
            return Asked(group.once.remote(held, queries, k, None if allowed is None else np.packbits(allowed), everywhere))

        return ask

    holders = [asking(group) for group in groups]
    return Spread(holders, card["width"], card["rows"], args.shard_deadline_s, args.missing_shards == "answer")
