"""Searching an index whose shards are spread over Ray actors: for indexes that one process cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrikt_ray.index.search import Searcher, complete, merge
from retrikt_ray.runtime.cluster import capacity
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError

READY_S = 120  # for actors to find a place on the cluster


class MissingShards(Exception):
    """Shards that did not answer in time, and without which nothing is to be answered."""


class ShardActor:
    """A Ray actor that holds some shards of an index. It opens them when it is first asked: after a restart, too."""

    def __init__(self, folder: Folder, files: list[str], threads: int) -> None:
        self.folder, self.files, self.threads = folder, files, threads
        self.searcher: Searcher | None = None

    def placed(self) -> bool:
        return True

    def opened(self) -> bool:
        self.searcher = self.searcher or Searcher.open(self.folder, self.threads, only=self.files)
        return True

    def once(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, everywhere: bool) -> tuple[np.ndarray, np.ndarray]:
        self.opened()
        assert self.searcher is not None
        return self.searcher.once(queries, k, allowed, everywhere)


class ActorSearcher:
    """The shards of an index spread over Ray actors, asked together; the same answers as `Searcher`.

    An actor that dies is started again by Ray, opens its shards anew, and answers the search that was lost, if it does so in time. Nobody waits
    again for one that is late until what it was asked has come.
    """

    def __init__(self, folder: Folder, actors: int, threads: int = 1, deadline_s: float = 60.0, partial: bool = False) -> None:
        """deadline_s: seconds of a search. partial: answer from the shards that have come by then (`missing` tells how many have not), else
        raise MissingShards."""
        import ray

        card = folder.read_json("index.json")
        actors = min(actors, len(card["shards"]))
        files = [part.tolist() for part in np.array_split([s["file"] for s in card["shards"]], actors)]  # neighbours together
        have = capacity()["CPU"]
        if actors * threads > have:  # Ray would wait for ever
            raise ConfigError(f"{actors} actors of {threads} CPUs ask for {actors * threads}; the cluster has, or can grow to, {have:g}")
        start: Any = ray.remote(num_cpus=threads, max_restarts=-1, max_task_retries=-1)(ShardActor)
        self.width, self.rows = card["width"], card["rows"]
        self.deadline_s, self.partial, self.missing = deadline_s, partial, 0  # missing: actors that the last search did without
        self.late: dict[int, Any] = {}  # what actors were asked and have not answered in time
        self.actors = [start.remote(folder, files[i], threads) for i in range(actors)]
        try:
            waiting = ray.wait([a.placed.remote() for a in self.actors], num_returns=actors, timeout=READY_S)[1]
            if waiting:
                raise ConfigError(
                    f"{len(waiting)} of {actors} actors of {threads} CPUs have not started for {READY_S} s: the cluster is busy or small"
                )
            ray.get([a.opened.remote() for a in self.actors])
        except ray.exceptions.RayTaskError as error:  # what an actor found wrong with its shards
            self.close()
            raise error.cause from None
        except ConfigError:
            self.close()
            raise

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Search.search`."""
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(f"queries have shape {queries.shape}; the index expects (Q, {self.width})")
        return complete(self.once, self.rows, queries, k, allowed)

    def once(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, everywhere: bool) -> tuple[np.ndarray, np.ndarray]:
        """As `Searcher.once`. Raises MissingShards."""
        import ray

        if self.late:
            ready = set(ray.wait(list(self.late.values()), num_returns=len(self.late), timeout=0)[0])
            self.late = {i: ref for i, ref in self.late.items() if ref not in ready}
        shared, mask = ray.put(queries), None if allowed is None else ray.put(allowed)
        asked = {i: a.once.remote(shared, k, mask, everywhere) for i, a in enumerate(self.actors) if i not in self.late}
        if asked:
            late = set(ray.wait(list(asked.values()), num_returns=len(asked), timeout=self.deadline_s)[1])
            self.late |= {i: ref for i, ref in asked.items() if ref in late}
        self.missing = len(self.late)
        if self.missing and not (self.partial and self.missing < len(self.actors)):
            raise MissingShards(f"{self.missing} of {len(self.actors)} actors that hold shards have not answered in {self.deadline_s:g} s")
        answers = ray.get([ref for i, ref in asked.items() if i not in self.late])
        return merge([a[0] for a in answers], [a[1] for a in answers], k)

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
