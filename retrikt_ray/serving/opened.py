"""A run that is open for answers: what its thread does for the requests of a batch, and how answers are written."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrikt_ray.knowledge.view import Neighbour, View
from retrikt_ray.predictor import Prediction, Predictor
from retrikt_ray.runtime.folders import MANIFEST, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.api.wire import RetrieveBody
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.serving.metrics import UNKNOWN, Metrics
from retrikt_ray.serving.shards import spread
from retrikt_ray.task.texts import Text

LEAST = 1e-9  # probability of which a logarithm is told: JSON has no infinity
EVIDENCE = ("id", "text", "text_pair", "source", "label", "score")  # of a row, beside what it was found by
SAMPLED_S = 1.0  # between two batches of which it is counted which voice decided


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
    version: str
    missing: int = 0  # groups of shards that were not asked, or have not answered


class Opened:
    """A run, the thread that opened it, and its answers. It never changes but for edits; another run is another one of these."""

    def __init__(self, run: str, args: ServeArgs, metrics: Metrics, groups: Sequence[Any] = (), like: Opened | None = None) -> None:
        """Open and verify. groups: handles of the deployments that hold its shards; none: they are opened here. like: what clients have asked
        till now, where it is to answer them.

        Raises ArtifactError and ConfigError as Predictor does, and where clients would have to ask otherwise.
        """
        self.run, self.metrics, self.sampled = run, metrics, float("-inf")
        self.seals = seals(run)
        # Thread counts of OpenMP belong to a thread, and fast tokenizers are not for two threads at once: one thread opens and answers.
        self.worker = ThreadPoolExecutor(1, "predictor")
        try:
            self.predictor: Predictor = self.worker.submit(open_predictor, run, args, groups, like).result()
        except BaseException:
            self.worker.shutdown(wait=False)
            raise

    def close(self) -> None:
        """After what it has been given to do."""
        self.worker.shutdown(wait=False)

    def version(self, view: View) -> str:
        """Tells states of the knowledge apart, of one run and of several."""
        return f"{self.predictor.release}.{view.version}"

    def work(self, jobs: list[Job], since: float) -> list[Any]:
        """Answer jobs, those of a kind in one pass; all from one version of the knowledge."""
        clock = Clock(self.metrics, since)
        clock("queue")
        self.metrics.batches.observe(len(jobs))
        answers: list[Any] = [None] * len(jobs)
        with self.predictor.knowledge.lock:  # all answers of a batch are from one view
            self.predictor.knowledge.refresh()
            view = self.predictor.knowledge.view
            for indices in alike(jobs):
                group = [jobs[i] for i in indices]
                view.base.searcher.missing = 0
                texts = [text for job in group for text in job.texts]
                found = (
                    self.answered(group[0], texts, clock) if group[0].kind in ("retrieve", "embed") else self.predicted(group, texts, clock)
                )
                rest = iter([] if isinstance(found, Refusal) else found)
                for i in indices:
                    answers[i] = (
                        found
                        if isinstance(found, Refusal)
                        else Answers([next(rest) for _ in jobs[i].texts], self.version(view), view.base.searcher.missing)
                    )
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
        if time.monotonic() - self.sampled > SAMPLED_S:
            self.sampled = time.monotonic()
            self.count_decisions(every)
        out: list[Any] = []
        low = 0
        for job in jobs:
            high = low + len(job.texts)
            if job.kind == "explain":
                out += self.explanations(every.part(low, high))
            else:
                out += [self.scores(answer, *job.asked) for answer in every.answers[low:high]]
            low = high
        return out

    def count_decisions(self, every: Prediction) -> None:
        """Count the voices without which a label would be another one, and the texts that were asked about."""
        own = every.told < 0
        if every.answers.shape[1] == 1 or not own.any():
            return
        self.metrics.sampled.inc(int(own.sum()))
        labels = every.answers[own].argmax(1)
        for name, others in every.without_voices.items():
            heard = ~np.isnan(others[own]).any(1)
            self.metrics.decided.labels(name).inc(int((others[own].argmax(1) != labels)[heard].sum()))

    def answered(self, job: Job, texts: list[Text], clock: Clock) -> Any:
        """Vectors of the texts, or their rows: the nearest; those that share most words; or, hybrid, both apart."""
        if job.kind == "embed":
            return self.predictor.student.encode(texts, clock=clock)[1].tolist()
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
        self.metrics.phase[phase].observe(now - self.since)
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


def seals(run: str) -> list[Any]:
    """Of what the stages made: changes when it is made anew. None for what is not complete."""
    return [(Folder.at(run) / name).signature(MANIFEST) for name in ("task", "student", "store", "index")]


def open_predictor(run: str, args: ServeArgs, groups: Sequence[Any], like: Opened | None) -> Predictor:
    """Open a run in the thread that will answer, and answer once: torch takes its time the first time. groups, like: as for Opened."""
    import torch

    torch.set_num_threads(args.threads)
    # Its own threads would take what others were promised: one thread is what a replica of one CPU has.
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if args.threads == 1 else "true"
    folder = Folder.at(run)
    if folder.is_local:
        folder = Folder.at(Path(folder.uri).resolve())  # a link may lead elsewhere later
    opener = (lambda index, _: spread(groups, args, index)) if groups else None
    opened = Predictor.open(folder, args.threads, opener=opener)
    if like and (opened.task.pair, opened.task.problem) != (like.predictor.task.pair, like.predictor.task.problem):
        raise ConfigError(f"{run} is a task of another kind than the run that answers, and would have to be asked otherwise")
    opened.predict(("a", "a") if opened.task.pair else "a")
    return opened
