"""A run that is open for answers: what its threads do for requests and edits, and how answers are written."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from retrikt_ray.knowledge.edit import Change
from retrikt_ray.knowledge.view import Neighbour, View
from retrikt_ray.predictor import Prediction, Predictor
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.serving.answering.job import UNKNOWN, Answers, Counted, Facts, Job, as_json, seals
from retrikt_ray.serving.answering.shards import spread
from retrikt_ray.serving.api.reading import Refusal
from retrikt_ray.serving.api.wire import RetrieveBody
from retrikt_ray.serving.args import ServeArgs
from retrikt_ray.task.texts import Text

LEAST = 1e-9  # probability of which a logarithm is told: JSON has no infinity
EVIDENCE = ("id", "text", "text_pair", "source", "label", "score")  # of a row, beside what it was found by
SAME_VALUE = 1e-6  # values of a regression that differ by less are the same
EDITS = ("put", "delete", "preview")
SAMPLED_S = 1.0  # between two batches of which it is counted which voice decided


class Opened:
    """A run, the threads that answer and edit, and its answers. It never changes but for edits; another run is another one of these."""

    def __init__(self, run: str, args: ServeArgs, groups: Sequence[Any] = (), like: Facts | None = None) -> None:
        """Open and verify. groups: handles of the deployments that hold its shards; none: they are opened here. like: of the run that clients
        have asked till now, where this is to take its place.

        Raises ArtifactError and ConfigError as Predictor does, and where clients would have to ask otherwise.
        """
        self.run, self.sampled = run, float("-inf")
        found = seals(run)
        # Thread counts of OpenMP belong to a thread, and fast tokenizers are not for two threads at once: one thread opens and answers.
        self.worker = ThreadPoolExecutor(1, "predictor")
        self.editor = ThreadPoolExecutor(1, "editor")  # a teacher that labels rows must not hold up answers
        try:
            self.predictor: Predictor = self.worker.submit(open_predictor, run, args, groups, like).result()
        except BaseException:
            self.close()
            raise
        task, place = self.predictor.task, str(self.predictor.knowledge.places.run)
        self.facts = Facts(self.predictor.release, task.pair, task.problem, place, found)

    def call(self, name: str, *args: Any) -> Future[Any]:
        """Do something of what stands below, in the thread that is for it."""
        thread = self.editor if name in EDITS else self.worker
        return thread.submit(getattr(self, name), *args)

    def ask(self, name: str, *args: Any) -> asyncio.Future[Any]:
        """As `call`, from a loop."""
        return asyncio.wrap_future(self.call(name, *args))

    def close(self) -> None:
        """After what it has been given to do."""
        self.worker.shutdown(wait=False)
        self.editor.shutdown(wait=False)

    def version(self, number: int) -> str:
        """Tells states of the knowledge apart, of one run and of several."""
        return f"{self.facts.release}.{number}"

    # of the thread that answers

    @contextmanager
    def newest(self) -> Iterator[View]:
        """The knowledge with all edits, which stays as it is meanwhile."""
        knowledge = self.predictor.knowledge
        with knowledge.lock:
            knowledge.refresh()
            yield knowledge.view

    def info(self) -> dict[str, Any]:
        """What is served, with the edits that the next request would see."""
        with self.newest():
            return self.predictor.info()

    def well(self) -> None:
        """Answer the text of a row, which looks like no drift. Raises whatever keeps it from answering."""
        with self.newest() as view:
            row = view.row(int(view.alive.argmax()))
            self.predictor.answer([(row["text"], row["text_pair"])], evidence=False)

    def work(self, jobs: list[Job], since: float) -> tuple[list[Any], Counted]:
        """Answer jobs, those of a kind in one pass; all from one version of the knowledge. since: when the first of them came."""
        counted = Counted(len(jobs), since)
        counted("queue")
        answers: list[Any] = [None] * len(jobs)
        with self.newest() as view:
            for indices in alike(jobs):
                group = [jobs[i] for i in indices]
                view.base.searcher.missing = 0
                texts = [text for job in group for text in job.texts]
                ask = self.answered if group[0].kind in ("retrieve", "embed") else self.predicted
                found = ask(group, texts, counted)
                rest = iter([] if isinstance(found, Refusal) else found)
                for i in indices:
                    answers[i] = (
                        found
                        if isinstance(found, Refusal)
                        else Answers([as_json(next(rest)) for _ in jobs[i].texts], self.version(view.version), view.base.searcher.missing)
                    )
        counted.texts, counted.version, counted.rows = sum(len(job.texts) for job in jobs), view.version, view.count
        counted("write")
        return answers, counted

    def predicted(self, jobs: list[Job], texts: list[Text], counted: Counted) -> list[Any]:
        """Predictions, and explanations where a job wants them, of all texts of these jobs."""
        every = self.predictor.answer(texts, any(job.kind == "explain" for job in jobs), clock=counted)
        if every.dense is not None:
            counted.searched += len(texts)
            counted.unlike += int((every.dense.scores[:, :1] < UNKNOWN).all(1).sum())
        if time.monotonic() - self.sampled > SAMPLED_S:
            self.sampled = time.monotonic()
            count_decisions(every, counted)
        out: list[Any] = []
        low = 0
        for asked, some in groupby(jobs, key=lambda job: None if job.kind == "explain" else job.asked):  # those that ask alike at once
            high = low + sum(len(job.texts) for job in some)
            out += self.explanations(every.part(low, high)) if asked is None else self.all_scores(every.answers[low:high], *asked)
            low = high
        return out

    def answered(self, jobs: list[Job], texts: list[Text], counted: Counted) -> Any:
        """Vectors of the texts of jobs that ask alike, or their rows: the nearest; those that share most words; or, hybrid, both apart."""
        if jobs[0].kind == "embed":
            return self.predictor.student.encode(texts, clock=counted)[1].tolist()
        asked: RetrieveBody = jobs[0].asked
        where, view = {"label": asked.label, "source": asked.source}, self.predictor.knowledge.view
        sides: dict[str, list[Any]] = {}
        try:
            if asked.mode != "lexical":
                sides["dense"] = records(view.neighbours(self.predictor.retrieve(texts, asked.k, **where), "similarity"))
                counted("dense")
            if asked.mode != "dense":
                sides["lexical"] = records(view.neighbours(view.search_words(texts, asked.k, **where), "bm25"))
                counted("lexical")
        except ConfigError as error:
            return Refusal(422, str(error), "a label of the task, a source of the store")
        if asked.mode != "hybrid":
            return sides[asked.mode]
        return [{side: rows[i] for side, rows in sides.items()} for i in range(len(texts))]

    def listing(self, words: str, label: str | None, source: str | None, offset: int, most: int) -> dict[str, Any]:
        """Some rows that hold these words, of a label and a source, newest first. Raises ConfigError on a label that there is not."""
        with self.newest() as view:
            here = source is None or source in view.sources  # else nothing was added yet
            found: Any = view.listed(words, label, source) if here else []
            rows = [record(view.neighbour(int(p))) for p in found[offset : offset + most]]
            return {"version": self.version(view.version), "total": len(found), "rows": rows}

    def compared(self, now: View, then: View, texts: list[Text]) -> list[dict[str, Any]]:
        """The answers to texts from two states of the knowledge."""
        with self.predictor.knowledge.lock:
            before, after = (self.predictor.answer(texts, False, view).answers for view in (now, then))
        pairs = zip(before, after, strict=True)
        return [{"changed": differs(a, b), "before": self.scores(a), "after": self.scores(b)} for a, b in pairs]

    # of the thread that edits

    def put(self, rows: list[Any], number: int | None) -> Change:
        """As Knowledge does."""
        return self.predictor.knowledge.put(rows, number)

    def delete(self, ids: list[str], number: int | None) -> Change:
        """As Knowledge does."""
        return self.predictor.knowledge.delete(ids, number)

    def preview(self, rows: list[Any], ids: list[str], texts: list[Text]) -> dict[str, Any]:
        """What an edit would do to the answers to some texts."""
        now, then = self.predictor.knowledge.preview(rows, ids)
        return {"version": self.version(now.version), "answers": self.call("compared", now, then, texts).result()}

    # how answers are written

    def scores(self, answer: np.ndarray, most: int | None = None, raw: bool = False) -> list[dict[str, Any]]:
        """Labels and scores of one answer (C,), as `all_scores`."""
        return self.all_scores(answer[None], most, raw)[0]

    def all_scores(self, answers: np.ndarray, most: int | None = None, raw: bool = False) -> list[list[dict[str, Any]]]:
        """Labels and scores of answers (Q, C), best first; a regression's value is the score of LABEL_0, as Hugging Face has it."""
        if answers.shape[1] == 1:
            return [[{"label": "LABEL_0", "score": value}] for value in answers[:, 0].tolist()]
        labels, values = self.predictor.task.labels, (np.log(np.maximum(answers, LEAST)) if raw else answers).tolist()
        order = np.argsort(-answers, axis=1, kind="stable")[:, :most].tolist()
        return [[{"label": labels[i], "score": some[i]} for i in best] for some, best in zip(values, order, strict=True)]

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


def count_decisions(every: Prediction, counted: Counted) -> None:
    """Count the voices without which a label would be another one, and the texts that were asked about."""
    own = every.told < 0
    if every.answers.shape[1] == 1 or not own.any():
        return
    counted.sampled += int(own.sum())
    labels = every.answers[own].argmax(1)
    for name, others in every.without_voices.items():
        heard = ~np.isnan(others[own]).any(1)
        counted.decided[name] = counted.decided.get(name, 0) + int((others[own].argmax(1) != labels)[heard].sum())


def differs(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two answers (C,) name another label; in regression, another value."""
    return bool(abs(before[0] - after[0]) > SAME_VALUE if len(before) == 1 else before.argmax() != after.argmax())


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


def open_predictor(run: str, args: ServeArgs, groups: Sequence[Any], like: Facts | None) -> Predictor:
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
    if like and (opened.task.pair, opened.task.problem) != (like.pair, like.problem):
        raise ConfigError(f"{run} is a task of another kind than the run that answers, and would have to be asked otherwise")
    opened.predict(("a", "a") if opened.task.pair else "a")
    return opened
