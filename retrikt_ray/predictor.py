"""Prediction with evidence: the student's own answer mixed with what it retrieves: rows and n-grams (`index/mixture.py`).

predictor = Predictor.open("runs/mine")
answer = predictor.predict("The river rises in the northern hills")    # or ("a text", "its second text"), or a list of such
answer.labels, answer.scores, answer.neighbours
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from retrikt_ray.index.mixture import NAMES, Mixture, Voice, Votes, mix, voices_of, without
from retrikt_ray.index.ngrams import Spoken
from retrikt_ray.knowledge.base import Opener, Places
from retrikt_ray.knowledge.knowledge import Knowledge
from retrikt_ray.knowledge.view import Hits, Neighbour, View
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import ArtifactError, Folder, digest
from retrikt_ray.task.texts import Text, read_texts, shown

if TYPE_CHECKING:
    from retrikt_ray.student.model import Student

SHOWN = 5  # neighbours, and n-grams, of a text in a notebook
MOST_SPOKEN = 8  # n-grams of a text that are named


def votes_of(hits: Hits | None) -> Votes | None:
    return None if hits is None else Votes(hits.scores, hits.labels)


def release_of(places: Places) -> str:
    """12 hex digits that tell what the stages of a run have made from what other stages have, whatever was edited since."""
    return digest([check(folder, only=[]).content for folder in (places.task, places.student, places.store, places.index)])[:12]


@dataclass(frozen=True)
class Prediction:
    """Answers for Q texts and what they rest on; one text is a list of one."""

    texts: list[Text]
    answers: np.ndarray  # (Q, C) mixed probabilities, or (Q, 1) values
    student: np.ndarray  # (Q, C) the student's own
    dense: Hits | None  # the nearest rows; None where they were not asked for
    lexical: Hits | None  # the rows that share most words
    voices: dict[str, Voice]  # what spoke beside the student: dense, lexical, ngrams
    view: View  # of the knowledge that answered
    mixture: Mixture  # that made answers of them
    told: np.ndarray  # (Q,) position of the added row that is the text word for word, whose label is the answer; -1: there is none

    @property
    def labels(self) -> list[str]:
        """The likeliest label of each text; in regression the value as text."""
        return [self.view.task.named(answer)[0] for answer in self.answers]

    @property
    def scores(self) -> list[float]:
        """The probability of each label; in regression the value."""
        return [self.view.task.named(answer)[1] for answer in self.answers]

    @property
    def neighbours(self) -> list[list[Neighbour]]:
        """The rows of the store that are nearest to each text, best first, with the teacher's label of each."""
        return self.view.neighbours(self.dense, "similarity") if self.dense else [[] for _ in self.answers]

    @property
    def lexical_neighbours(self) -> list[list[Neighbour]]:
        """The rows of the store that share most words with each text."""
        return self.view.neighbours(self.lexical, "bm25") if self.lexical else [[] for _ in self.answers]

    @property
    def ngrams(self) -> list[list[Spoken]]:
        """The words and word pairs of each text that say most for (above 0) or against its answer, by the n-gram memory; strongest first."""
        return [
            self.view.ngrams.spoken(text, int(answer.argmax()), MOST_SPOKEN) for text, answer in zip(self.texts, self.answers, strict=True)
        ]

    def part(self, low: int, high: int) -> Prediction:
        """Of the texts low .. high - 1."""
        dense, lexical = (h and h.part(low, high) for h in (self.dense, self.lexical))
        voices = {name: (said[low:high], found[low:high]) for name, (said, found) in self.voices.items()}
        texts, answers, student = self.texts[low:high], self.answers[low:high], self.student[low:high]
        return Prediction(texts, answers, student, dense, lexical, voices, self.view, self.mixture, self.told[low:high])

    @property
    def without_voices(self) -> dict[str, np.ndarray]:
        """(Q, C) answers as they would be without each voice that was asked; NaN where nothing is left."""
        asked = [name for name in NAMES if name == "student" or name in self.voices]
        return {name: without(name, self.student, self.voices, self.mixture) for name in asked}

    def without_rows(self, i: int) -> dict[str, np.ndarray]:
        """(C,) answers to text i as they would be if one row that was found had no vote, by the row's id. What else spoke stays as it was."""
        sides = [h for h in (self.dense, self.lexical) if h is not None]
        rows = np.unique(np.concatenate([h.positions[i][h.positions[i] >= 0] for h in sides])) if sides else np.zeros(0, np.int64)
        if not len(rows):
            return {}

        def votes(hits: Hits | None) -> Votes | None:
            if hits is None:
                return None
            scores = np.where(hits.positions[i] == rows[:, None], -np.inf, hits.scores[i])  # (R, k): a row's own vote taken out
            return Votes(scores, np.broadcast_to(hits.labels[i], (len(rows), *hits.labels[i].shape)))

        said = self.voices.get("ngrams")
        ngrams = said and (np.repeat(said[0][i : i + 1], len(rows), 0), np.repeat(said[1][i : i + 1], len(rows), 0))
        voices = voices_of(votes(self.dense), votes(self.lexical), ngrams, self.mixture)
        answers = mix(np.repeat(self.student[i : i + 1], len(rows), 0), voices, self.mixture)
        return dict(zip(self.view.ids_of(rows), answers, strict=True))

    def __len__(self) -> int:
        return len(self.answers)

    def __repr__(self) -> str:
        lines = (f"{label} {score:.2f}  {shown(text)}" for label, score, text in zip(self.labels, self.scores, self.texts, strict=True))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A table for notebooks: each text with its answer, its nearest rows, and the n-grams that say most."""
        rows = []
        for text, label, score, near, spoken in zip(self.texts, self.labels, self.scores, self.neighbours, self.ngrams, strict=True):
            found = "<br>".join(f"{n.similarity:.2f} {escape(n.label)}: {escape(shown((n.text, n.text_pair)))}" for n in near[:SHOWN])
            said = "<br>".join(f"{s.weight:+.2f} {escape(s.ngram)}" for s in spoken[:SHOWN])
            cells = (escape(shown(text)), f"<b>{escape(label)}</b>", f"{score:.2f}", found, said)
            rows.append("<tr>" + "".join(f'<td style="text-align:left;vertical-align:top">{cell}</td>' for cell in cells) + "</tr>")
        head = "".join(f"<th>{name}</th>" for name in ("text", "label", "score", "nearest rows", "words that say most"))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


class Predictor:
    """Student and knowledge of a run, opened for answering."""

    def __init__(self, student: Student, knowledge: Knowledge, mixture: Mixture, release: str) -> None:
        self.student, self.knowledge, self.mixture, self.release = student, knowledge, mixture, release
        self.task = knowledge.task

    @staticmethod
    def open(run: str | os.PathLike[str] | Folder, threads: int = 1, *, edited: bool = True, opener: Opener | None = None) -> Predictor:
        """Open RUN's task, student and knowledge after comparing each with its manifest. edited, opener: as for Knowledge.

        Raises ArtifactError that names the file that is missing, altered, or does not belong to the others.
        """
        return Predictor.at(Places.of(run if isinstance(run, Folder) else Folder.at(run), edited), threads, opener)

    @staticmethod
    def at(places: Places, threads: int = 1, opener: Opener | None = None) -> Predictor:
        """Open what lies in these folders, as `open` does."""
        from retrikt_ray.student.model import Student

        release = release_of(places)
        knowledge, index = Knowledge(places, threads, opener), places.index
        if check(index, deep=True, only=["mixture.json"]).inputs["student"] != knowledge.student:
            raise ArtifactError(f"{index}/mixture.json was fitted for another student; run `retrikt index {places.run or 'RUN'}`")
        try:
            mixture = Mixture(**index.read_json("mixture.json"))
        except TypeError as error:
            raise ArtifactError(
                f"{index}/mixture.json is not of this version ({error}); run `retrikt index {places.run or 'RUN'}`"
            ) from None
        student = Student.load(str(places.student.local()))
        if release_of(places) != release:
            raise ArtifactError(f"{places.run or places.student} was made anew while it was opened: open it again")
        return Predictor(student, knowledge, mixture, release)

    def predict(self, texts: Any, evidence: bool = True) -> Prediction:
        """Answer a text, a pair ("a text", "its second text"), or a list of such. evidence=False: sides without a vote are not searched.

        Raises TextError that names the text that cannot be used.
        """
        return self.answer(read_texts(texts, self.task.pair), evidence)

    def answer(
        self, texts: Sequence[Text], evidence: bool = True, view: View | None = None, clock: Callable[[str], None] = lambda phase: None
    ) -> Prediction:
        """As `predict`, for Q texts that were read already.

        view: of the knowledge to answer from, default: today's; clock: called with the name of each phase when it has ended.
        """
        texts, view, m = list(texts), view or self.knowledge.view, self.mixture
        answers, vectors = (x.numpy() for x in self.student.encode(texts, clock=clock))
        dense = view.search(vectors, m.k) if m.dense or evidence else None
        clock("dense")
        lexical = view.search_words(texts, m.lexical_k) if m.lexical or evidence else None
        clock("lexical")
        ngrams = view.ngrams.answers(texts) if m.ngrams or evidence else None
        clock("ngrams")
        voices = voices_of(votes_of(dense), votes_of(lexical), ngrams, m)
        mixed, told = mix(answers, voices, m), view.told_of(texts)
        if (told >= 0).any():  # what a person has said of a text is not outvoted
            mixed[told >= 0] = view.labels_of(told[told >= 0])
        clock("mix")
        return Prediction(texts, mixed, answers, dense, lexical, voices, view, m, told)

    def retrieve(self, texts: Sequence[Text], k: int, **where: str | None) -> Hits:
        """The k nearest rows of each text that was read already; label=, source=: only such rows."""
        return self.knowledge.view.search(self.student.encode(list(texts))[1].numpy(), k, **where)

    def info(self) -> dict[str, Any]:
        """What is served: task, labels, sizes, mixture, index."""
        view, task = self.knowledge.view, self.task
        return {
            "task": task.name,
            "problem": task.problem,
            "labels": list(task.labels),
            "pair": task.pair,
            "release": self.release,
            "student": {"kind": self.student.model.config.kind, "parameters": self.student.model.parameter_count},
            "store": {"rows": view.count, "version": view.version},
            "index": {"factory": view.base.card["factory"], "shards": len(view.base.card["shards"]), "width": view.base.card["width"]},
            "ngrams": {"ngrams": len(view.ngrams.keys), "numbers": view.ngrams.numbers},
            "mixture": asdict(self.mixture),
        }
