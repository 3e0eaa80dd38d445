"""Searching an index whose shards others hold, asked together: for indexes that one process cannot hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from retrikt_ray.index.search import checked, complete, merge

AGAIN_S = 0.1  # before a holder that was lost is asked again

Found = tuple[np.ndarray, np.ndarray]


class MissingShards(Exception):
    """Shards that did not answer in time, and without which nothing is to be answered."""


class Gone(Exception):
    """Who held shards ended while it was asked."""


class Pending(Protocol):
    """A question on its way."""

    def result(self, timeout_s: float) -> Found:
        """As `Searcher.once`. Raises TimeoutError where the answer has not come by then, Gone, and what was found wrong with the shards."""
        ...


Ask = Callable[[np.ndarray, int, np.ndarray | None, bool], Pending]  # with the arguments of `Searcher.once`


class Spread:
    """The shards of an index, by their holders: the same answers as `Searcher`.

    A holder that is lost is asked again for as long as there is time. Nobody waits again for one that is late until what it was asked has come.
    """

    def __init__(self, holders: Sequence[Ask], width: int, rows: int, deadline_s: float, partial: bool = False) -> None:
        """deadline_s: seconds of a search. partial: answer from the shards that have come by then (`missing` tells how many holders have not),
        else raise MissingShards."""
        self.holders, self.width, self.rows = holders, width, rows
        self.deadline_s, self.partial = deadline_s, partial
        self.missing = 0  # holders that the last search did without
        self.late: dict[int, Pending] = {}

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Found:
        """As `Search.search`. Raises MissingShards."""
        return complete(self.once, self.rows, checked(queries, k, self.width), k, allowed)

    def once(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, everywhere: bool) -> Found:
        """As `Searcher.once`. Raises MissingShards."""
        until = time.monotonic() + self.deadline_s
        self.late = {i: pending for i, pending in self.late.items() if not over(pending)}
        asked = {i: ask(queries, k, allowed, everywhere) for i, ask in enumerate(self.holders) if i not in self.late}
        answers: list[Found] = []
        for i, pending in asked.items():
            while True:
                try:
                    answers.append(pending.result(max(0.0, until - time.monotonic())))
                    break
                except TimeoutError:
                    self.late[i] = pending
                    break
                except Gone:
                    if time.monotonic() > until:
                        break
                time.sleep(AGAIN_S)
                pending = self.holders[i](queries, k, allowed, everywhere)
        self.missing = len(self.holders) - len(answers)
        if self.missing and not (self.partial and answers):
            raise MissingShards(f"{self.missing} of {len(self.holders)} groups of shards have not answered in {self.deadline_s:g} s")
        return merge([a[0] for a in answers], [a[1] for a in answers], k)


def over(pending: Pending) -> bool:
    """Whether it has come, to nobody: a fault is told to those who ask next."""
    try:
        pending.result(0)
    except TimeoutError:
        return False
    except Exception:
        return True
    return True
