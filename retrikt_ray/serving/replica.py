"""One replica: a Predictor, the thread that it answers in, and what waits for it.

A replica is ingress and student at once: the routes (`routes.py`) read and check requests on the event loop, and one thread runs student and index
over all that have come meanwhile. One process and no hop was the fastest of the layouts that were measured; one thread keeps the event loop
free, also where Serve's throughput mode shares it with user code. Nobody waits for others to come: a request that finds the thread idle is
answered at once, and those that come while it works are the next batch.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from retrikt_ray.knowledge.actors import ActorSearcher
from retrikt_ray.knowledge.view import Neighbour
from retrikt_ray.predictor import Prediction, Predictor
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.metrics import UNKNOWN, Metrics
from retrikt_ray.serving.reading import Refusal
from retrikt_ray.serving.wire import RetrieveBody
from retrikt_ray.task.texts import Text

LEAST = 1e-9  # probability of which a logarithm is told: JSON has no infinity
EVIDENCE = ("id", "text", "text_pair", "source", "label", "score")  # of a row, beside what it was found by


@dataclass(frozen=True)
class Job:
    """What one request wants of the thread."""

    kind: str  # predict | explain | retrieve | embed
    texts: list[Text]
    asked: Any = None  # predict: (labels per text, whether raw); retrieve: its body


@dataclass(frozen=True)
class Answers:
    """One answer per text, and the version of the knowledge that all of them are from."""

    items: list[Any]
    version: int


class Batcher:
    """Gathers what waits while the thread works. work: jobs -> an answer, or the error, of each; it runs in the thread."""

    def __init__(self, work: Callable[[list[Any], float], list[Any]], most: int, thread: ThreadPoolExecutor) -> None:
        self.work, self.most, self.thread = work, most, thread
        self.waiting: deque[tuple[Any, asyncio.Future[Any], float]] = deque()
        self.busy = False

    async def ask(self, job: Any) -> Any:
        """The answer to a job; one whose caller has gone meanwhile is not worked on."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self.waiting.append((job, future, time.perf_counter()))
        if not self.busy:
            self.busy = True
            loop.call_soon(self.start, loop)  # what else comes with this turn of the loop goes along
        return await future

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        batch: list[Any] = []
        while self.waiting and len(batch) < self.most:
            entry = self.waiting.popleft()
            if not entry[1].done():
                batch.append(entry)
        self.busy = bool(batch)
        if batch:
            self.thread.submit(self.run, batch, loop)

    def run(self, batch: list[Any], loop: asyncio.AbstractEventLoop) -> None:
        try:
            answers = self.work([job for job, _, _ in batch], batch[0][2])
        except Exception as error:
            answers = [error] * len(batch)
        loop.call_soon_threadsafe(self.finish, batch, answers, loop)

    def finish(self, batch: list[Any], answers: list[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.start(loop)  # the thread goes on while these are written
        for (_, future, _), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


class Endpoint:
    """One replica."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.args = ServeArgs(**args)
        self.active = self.editing = 0  # requests and edits that wait or are worked on
        self.metrics = Metrics()
        # Thread counts of OpenMP belong to a thread, and fast tokenizers are not for two threads at once: one thread opens and answers.
        self.worker = ThreadPoolExecutor(1, "predictor")
        self.editor = ThreadPoolExecutor(1, "editor")  # a teacher that labels rows must not hold up answers
        self.batcher = Batcher(self.work, self.args.max_batch, self.worker)
        self.predictor = self.worker.submit(open_predictor, self.args).result()

    async def ask(self, job: Job) -> Answers:
        """The answer to a job. Raises Refusal 503 where too many wait, 504 where it takes too long, 422 on a filter that does not exist."""
        if self.active >= self.args.capacity:
            raise Refusal(503, f"{self.active} requests are waiting already", "the same request a second later", {"Retry-After": "1"})
        self.active += 1
        try:
            async with asyncio.timeout(self.args.deadline_s):
                answers: Answers = await self.batcher.ask(job)
                return answers
        except TimeoutError:
            raise Refusal(504, f"there was no answer within {self.args.deadline_s:g} s", "fewer texts, or a time of less load") from None
        finally:
            self.active -= 1

    def work(self, jobs: list[Job], since: float) -> list[Any]:
        """Answer jobs, those of a kind in one pass; all from one version of the knowledge."""
        clock = Clock(self.metrics, since)
        clock("queue")
        self.metrics.batches.observe(len(jobs))
        answers: list[Any] = [None] * len(jobs)
        with self.predictor.knowledge.lock:  # a new base must not close the old one's searcher under us
            self.predictor.knowledge.refresh()
            view = self.predictor.knowledge.view
            for indices in alike(jobs):
                group = [jobs[i] for i in indices]
                texts = [text for job in group for text in job.texts]
                found = (
                    self.answered(group[0], texts, clock) if group[0].kind in ("retrieve", "embed") else self.predicted(group, texts, clock)
                )
                rest = iter([] if isinstance(found, Refusal) else found)
                for i in indices:
                    answers[i] = found if isinstance(found, Refusal) else Answers([next(rest) for _ in jobs[i].texts], view.version)
        self.metrics.texts.inc(sum(len(job.texts) for job in jobs))
        self.metrics.version.set(view.version)
        self.metrics.rows.set(view.count)
        clock("write")
        return answers

    def predicted(self, jobs: list[Job], texts: list[Text], clock: Clock) -> list[Any]:
        """Predictions, and explanations where a job wants them, of all texts of these jobs."""
        every = self.predictor.answer(texts, any(job.kind == "explain" for job in jobs), clock=clock)
        if every.dense is not None:
            self.metrics.searched.inc(len(texts))
            self.metrics.unlike.inc(int((every.dense.scores[:, :1] < UNKNOWN).all(1).sum()))
        out: list[Any] = []
        low = 0
        for job in jobs:
            part = every.part(low, low + len(job.texts))
            low += len(job.texts)
            out += self.explanations(part) if job.kind == "explain" else [self.scores(answer, *job.asked) for answer in part.answers]
        return out

    def answered(self, job: Job, texts: list[Text], clock: Clock) -> Any:
        """Vectors of the texts, or their rows: the nearest; those that share most words; or, hybrid, both apart."""
        if job.kind == "embed":
            vectors = self.predictor.student.encode(texts)[1].tolist()
            clock("encode")
            return vectors
        asked: RetrieveBody = job.asked
        where, view = {"label": asked.label, "source": asked.source}, self.predictor.knowledge.view
        sides: dict[str, list[Any]] = {}
        try:
            if asked.mode != "lexical":
                sides["dense"] = records(view.neighbours(self.predictor.retrieve(texts, asked.k, **where), "similarity"))
                clock("dense")
            if asked.mode != "dense":
                sides["lexical"] = records(view.neighbours(view.search_words(texts, asked.k, **where), "bm25"))
                clock("lexical")
        except ConfigError as error:
            return Refusal(422, str(error), "a label of the task, a source of the store")
        if asked.mode != "hybrid":
            return sides[asked.mode]
        return [{side: rows[i] for side, rows in sides.items()} for i in range(len(texts))]

    async def apart(self, thread: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        """Do something in a thread of the replica."""
        return await asyncio.get_running_loop().run_in_executor(thread, work)

    async def info(self) -> dict[str, Any]:
        """What is served, with the edits that the next request would see."""

        def work() -> dict[str, Any]:
            with self.predictor.knowledge.lock:
                self.predictor.knowledge.refresh()
                return self.predictor.info()

        return dict(await self.apart(self.worker, work))

    def scores(self, answer: np.ndarray, most: int | None = None, raw: bool = False) -> list[dict[str, Any]]:
        """Labels and scores of one answer (C,), best first; a regression's value is the score of LABEL_0, as Hugging Face has it."""
        if len(answer) == 1:
            return [{"label": "LABEL_0", "score": float(answer[0])}]
        labels, values = self.predictor.task.labels, (np.log(np.maximum(answer, LEAST)) if raw else answer).tolist()
        return [{"label": labels[i], "score": values[i]} for i in np.argsort(-answer, kind="stable")[:most].tolist()]

    def explanations(self, part: Prediction) -> list[dict[str, Any]]:
        """Per text: the answer, the student's own, what else spoke, the rows and n-grams it rests on, the weights, and the answer without each."""
        sides = {"neighbours": part.neighbours, "lexical_neighbours": part.lexical_neighbours}
        ngrams, without = part.ngrams, part.without_voices
        out = []
        for i, answer in enumerate(part.answers):
            rows = part.without_rows(i)
            best = int(answer.argmax())
            left = {name: None if np.isnan(others[i]).any() else self.scores(others[i]) for name, others in without.items()}
            for name, scores in left.items():
                if part.told[i] < 0 and scores and len(answer) > 1 and scores[0]["label"] != self.scores(answer, 1)[0]["label"]:
                    self.metrics.decided.labels(name).inc()
            shown = {
                side: [
                    record | {"without": self.scores(rows[record["id"]], 1)[0] | {"change": float(rows[record["id"]][best] - answer[best])}}
                    for record in records([found[i]])[0]
                ]
                for side, found in sides.items()
            }
            out.append(
                {
                    "prediction": self.scores(answer),
                    "told": None if part.told[i] < 0 else part.view.row(int(part.told[i]))["id"],
                    "student": self.scores(part.student[i]),
                    "votes": {name: self.scores(vote[i]) if found[i] else None for name, (vote, found) in part.voices.items()},
                    "without": left,
                    **shown,
                    "ngrams": [asdict(spoken) for spoken in ngrams[i]],
                    "mixture": asdict(part.mixture),
                }
            )
        return out


class Clock:
    """Called at the end of a phase, with its name; it counts the time since the call before."""

    def __init__(self, metrics: Metrics, since: float) -> None:
        self.metrics, self.since = metrics, since

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self.metrics.phases.labels(phase).observe(now - self.since)
        self.since = now


def alike(jobs: list[Job]) -> list[list[int]]:
    """Jobs that can be answered in one pass, by their number."""
    groups: dict[Any, list[int]] = {}
    for i, job in enumerate(jobs):
        asked = (job.asked.mode, job.asked.k, job.asked.label, job.asked.source) if job.kind == "retrieve" else ()
        groups.setdefault(("predict" if job.kind == "explain" else job.kind, *asked), []).append(i)
    return list(groups.values())


def record(row: Neighbour) -> dict[str, Any]:
    """A row as JSON has it."""
    found = {by: v for by, v in (("similarity", row.similarity), ("bm25", row.bm25)) if v is not None}
    return {key: getattr(row, key) for key in EVIDENCE} | found


def records(found: list[list[Neighbour]]) -> list[list[dict[str, Any]]]:
    """Rows that were found for each text."""
    return [[record(row) for row in rows] for rows in found]


def open_predictor(args: ServeArgs) -> Predictor:
    """Open the run in the thread that will answer."""
    import torch

    torch.set_num_threads(args.threads)
    if not args.shard_actors:
        return Predictor.open(args.run, args.threads)
    return Predictor.open(args.run, args.threads, opener=lambda index, threads: ActorSearcher(index, args.shard_actors, threads))
