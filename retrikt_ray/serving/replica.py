"""One replica: a run that is open for answers, what waits for it, and how another run takes its place.

A replica is ingress and student at once: the routes (`api/routes.py`) read and check requests on the event loop, and one thread, in a process
beside it (`process.py`) or in the same one, runs student and index over all that have come meanwhile. Nobody waits for others to come: a request
that finds the thread idle is answered at once, and those that come while it works are the next batch.

Another run is opened, verified and asked once beside the one that answers; then one reference is swapped. A batch in work ends with the run it
began with. What cannot be opened is refused, and the run before goes on.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrikt_ray.index.spread import MissingShards
from retrikt_ray.runtime.folders import ArtifactError
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.answering.job import Answers, Counted, Facts, Job, seals
from retrikt_ray.serving.answering.process import Away, Ended, Process
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.front import LOST
from retrikt_ray.serving.metrics import Metrics

if TYPE_CHECKING:
    from retrikt_ray.serving.answering.opened import Opened

LOOK_S = 1.0  # between two looks at a run that is watched
AGAIN_S = 30.0  # after which a run that was refused is tried again
Waiting = tuple[Job, asyncio.Future[Any], float]  # since when, on the clock of `perf_counter`
logger = logging.getLogger("ray.serve")


class Batcher:
    """Gathers what waits while the thread works. opened: what answers now; a batch begins and ends with the same. count: told of each batch."""

    def __init__(self, opened: Callable[[], Opened | Away], most: int, count: Callable[[Counted], None]) -> None:
        self.opened, self.most, self.count = opened, most, count
        self.waiting: deque[Waiting] = deque()
        self.busy = False

    async def ask(self, job: Any) -> Any:
        """The answer to a job; one whose caller has gone meanwhile is not worked on."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self.waiting.append((job, future, time.perf_counter()))
        if not self.busy:
            self.busy = True
            self.working = loop.create_task(self.work())  # what else comes with this turn of the loop goes along
        return await future

    async def work(self) -> None:
        """Until nobody waits."""
        batch, answers = self.next()
        while answers:
            found, counted = await answers
            done = batch
            batch, answers = self.next()  # the thread goes on while these are written
            for (_, future, _), answer in zip(done, found, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
            if counted:
                self.count(counted)

    def next(self) -> tuple[list[Waiting], asyncio.Task[Any] | None]:
        """Those who waited longest, and their answers to come; None: nobody waits."""
        batch: list[Waiting] = []
        while self.waiting and len(batch) < self.most:
            entry = self.waiting.popleft()
            if not entry[1].done():
                batch.append(entry)
        self.busy = bool(batch)
        return batch, asyncio.create_task(self.answers(batch)) if batch else None

    async def answers(self, batch: list[Waiting]) -> tuple[list[Any], Counted | None]:
        try:
            found: tuple[list[Any], Counted] = await self.opened().ask("work", [job for job, _, _ in batch], batch[0][2])
            return found
        except Exception as error:
            return [error] * len(batch), None


def refusal(error: MissingShards | Ended) -> Refusal:
    """Of what a replica cannot answer for now: shards are missing, or the process that answers has ended, and the replica ends, too."""
    if isinstance(error, MissingShards):
        return Refusal(503, str(error), "the same request some seconds later", {"Retry-After": "2"})
    return Refusal(503, LOST.error, LOST.expected, {"Retry-After": "1"})


class Endpoint:
    """One replica."""

    hold: Callable[[str], Awaitable[Any]] | None = None  # the app of another run by its name, where there are such

    def __init__(
        self, args: dict[str, Any], groups: Sequence[Any] = (), metrics: Metrics | None = None, process: Process | None = None
    ) -> None:
        """groups: handles of the deployments that hold the shards. metrics: those of the process, where there are some already. process: where
        runs are opened; None: in this one."""
        self.args, self.groups, self.process = ServeArgs(**args), groups, process
        if len(groups) != self.args.shard_groups:
            raise ConfigError(f"shard_groups is {self.args.shard_groups}, and {len(groups)} are there: only Ray Serve starts them")
        self.active = self.editing = 0  # requests and edits that wait or are worked on
        self.metrics = metrics or Metrics()
        self.batcher = Batcher(lambda: self.opened, self.args.max_batch, self.metrics.count)
        self.swapping, self.closed = threading.Lock(), threading.Event()
        self.refused: str | None = None  # why the run that was last offered is not the one that answers
        self.opened = self.open(self.args.run)
        self.metrics.refused.set(0)
        self.metrics.taken.labels(self.opened.facts.release).set_to_current_time()
        if self.args.reload:
            threading.Thread(target=self.watch, daemon=True).start()

    def open(self, run: str, like: Facts | None = None) -> Opened | Away:
        """As Opened."""
        if self.process:
            return self.process.open(run, self.args, like)
        from retrikt_ray.serving.answering.opened import (
            Opened,  # and with it all that computes, which a replica does without whose process does that
        )

        return Opened(run, self.args, self.groups, like)

    async def ask(self, job: Job) -> Answers:
        """The answer to a job. Raises Refusal 503 where too many wait, 504 where it takes too long, 422 on a filter that does not exist."""
        if self.active >= self.args.capacity:
            raise Refusal(503, f"{self.active} requests are waiting already", "the same request a second later", {"Retry-After": "1"})
        self.active += 1
        try:
            async with asyncio.timeout(self.args.deadline_s):
                answers: Answers = await self.batcher.ask(job)
                return answers
        except (MissingShards, Ended) as error:
            raise refusal(error) from None
        except TimeoutError:
            raise Refusal(504, f"there was no answer within {self.args.deadline_s:g} s", "fewer texts, or a time of less load") from None
        finally:
            self.active -= 1

    async def answers(self) -> None:
        """Ask the student and the index for the text of a row, which looks like no drift. Raises TimeoutError and what else keeps a replica from
        answering.

        A full queue, and a run that was damaged on its disk, are not the replica's fault: another one would do no better.
        """
        try:
            async with asyncio.timeout(self.args.deadline_s):
                await self.asked(self.opened, "well")
        except (ArtifactError, ConfigError) as error:
            logger.error(f"cannot answer from {self.opened.run}: {error}")

    async def asked(self, opened: Opened | Away, name: str, *args: Any) -> Any:
        """What one of its threads does that is not answering a batch. Raises Refusal 503 as `ask` does."""
        try:
            return await opened.ask(name, *args)
        except (MissingShards, Ended) as error:
            raise refusal(error) from None

    async def info(self) -> dict[str, Any]:
        """What is served, with the edits that the next request would see, and what was refused."""
        return await self.asked(self.opened, "info") | {"refused": self.refused}

    def swap(self, run: str) -> bool:
        """Answer from this run from now on, opened anew. False where it cannot be opened: nothing changes then, and `refused` says why."""
        with self.swapping:
            try:
                fresh = self.open(run, self.opened.facts)
            except Exception as error:  # whatever is wrong with it: the run that answers goes on
                self.refuse(run, error)
                return False
            before, self.opened, self.refused = self.opened, fresh, None
            self.metrics.swapped(fresh.facts.release)
            logger.info(f"answering from {run}, release {fresh.facts.release}")
        # What it was given ends there: batches soon, what an edit would do within the deadline.
        end = threading.Timer(self.args.deadline_s + 5, before.close)
        end.daemon = True
        end.start()
        return True

    def close(self) -> None:
        """Watch no longer, and give up the run and its threads after what they have been given to do."""
        self.closed.set()
        self.opened.close()
        self.metrics.refused.set(0)

    def refuse(self, run: str, error: Exception) -> None:
        """Go on as before."""
        known = isinstance(error, ArtifactError | ConfigError | OSError)
        logger.error(f"refused to take over {run}: {error}", exc_info=not known)
        self.refused = str(error).replace(str(Path(run).resolve()), "the run").replace(run, "the run") if known else type(error).__name__
        self.metrics.swap_refused()

    def watch(self) -> None:
        """Take over the run that answers when it was made anew and is complete; one that was refused is tried again, since files may follow."""
        tried: list[Any] = []
        seen, again = self.opened.facts.seals, 0.0
        while not self.closed.wait(LOOK_S):
            opened, before = self.opened, seen
            try:
                seen = seals(opened.run)
            except Exception as error:  # of a store that cannot be reached for now
                logger.error(f"cannot look at {opened.run}: {error}")
                continue
            if seen == opened.facts.seals and tried:  # what was refused was taken back
                tried, self.refused = [], None
                self.metrics.refused.set(0)
            new = seen != opened.facts.seals and None not in seen and (seen != tried or time.monotonic() > again)
            if new and seen == before:  # it has stood for a while: a new student is followed by a new index
                tried, again = seen, time.monotonic() + AGAIN_S
                self.swap(opened.run)
