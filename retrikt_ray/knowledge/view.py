"""One state of a run's knowledge, opened for search: a base and the edits over it. A view never changes; a newer state is another view.

Rows have positions: those of the base (the run's `store/` and `index/`, or what compaction wrote in their place) come first, added rows go on
behind them. Added rows are searched exactly, in memory, beside the base; deleted ones are passed over. Nothing is answered
before every file was compared with its manifest, and the manifests with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrikt_ray.index.learning import edited
from retrikt_ray.index.lexical import Lexical
from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.search import Search, Searcher, merge
from retrikt_ray.knowledge.log import Log, base_of, check_origin, read_edit
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.runtime.tables import matrix
from retrikt_ray.store.rows import VIEWED
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import TEXT_COLUMNS, Text, texts_of

Opener = Callable[[Folder, int], Search]  # (index, threads) -> who answers dense queries


@dataclass(frozen=True)
class Places:
    """Where the parts of a run's knowledge are."""

    task: Folder
    student: Folder
    store: Folder
    index: Folder
    run: Folder | None = None  # whose edits count; None: everything as the stages made it

    @staticmethod
    def of(run: Folder, edited: bool = True) -> Places:
        """Those of a run directory. Raises ArtifactError where it is none."""
        if not run.exists("config.yaml"):
            raise ArtifactError(f"{run} is not a run directory: it has no config.yaml")
        return Places(run / "task", run / "student", run / "store", run / "index", run if edited else None)

    @property
    def log(self) -> Folder | None:
        """The folder of the edits."""
        return self.run and self.run / "knowledge"


@dataclass(frozen=True)
class Base:
    """A store and its index, opened and verified."""

    name: str | None  # folder below knowledge/ that compaction wrote; None: the run's own store/ and index/
    store: Folder
    contents: dict[str, str]  # digests of the student, store and index
    card: dict[str, Any]  # index.json
    rows: pa.Table  # the columns VIEWED
    searcher: Search
    words: Lexical
    ngrams: Memory


def open_base(places: Places, log: Log | None, student: str, threads: int, opener: Opener) -> Base:
    """Open the store and the index that the log names, or the run's own. student: digest of the one that this process has open.

    Raises ArtifactError that names the file that is missing, altered, or does not belong to the others.
    """
    if check(places.student).content != student:
        raise ArtifactError(f"{places.student} was made anew since this process opened it: start the process again")
    store, index, run = places.store, places.index, places.run
    if log and run:
        check_origin(run, log)
        store, index = base_of(run, log) / "store", base_of(run, log) / "index"
    # The manifests with each other, before any file with its manifest: a whole manifest of another run must not vouch for anything.
    seals = {"store": check(store, only=[]), "index": check(index, only=[])}
    contents = {"student": student} | {name: seal.content for name, seal in seals.items()}
    for name, content in log.contents.items() if log else ():
        if content != contents[name] and name != "student" and store != places.store:
            raise ArtifactError(
                f"{store if name == 'store' else index}/{MANIFEST} was exchanged: it is not the one that {places.log}/{MANIFEST} knows"
            )
        if content != contents[name]:
            raise ArtifactError(
                f"{places.log}/{MANIFEST} holds edits of another {name} than {run}/{name}: it was made anew since. "
                f"`retrikt store compact {run}` takes the edits over"
            )
    for name, folder in (("student", places.student), ("store", store)):
        if seals["index"].inputs.get(name) != contents[name]:
            raise ArtifactError(
                f"{index}/{MANIFEST} says that the index was built from another {name} than {folder}; run `retrikt index {run or 'RUN'}`"
            )
    for folder in (store, index):
        check(folder, deep=True)
    card, words = index.read_json("index.json"), Lexical.unsealed(index)
    rows = store.read_tables(columns=[*VIEWED])
    for part, found in (("shards", card["rows"]), ("words", words.rows)):
        if found != rows.num_rows:
            raise ArtifactError(f"{index} holds {part} of {found} rows, {store} has {rows.num_rows}")
    return Base(log.base if log else None, store, contents, card, rows, opener(index, threads), words, Memory.unsealed(index))


@dataclass(frozen=True)
class Hits:
    """What a search found for Q queries, best first."""

    positions: np.ndarray  # (Q, k) int64, -1 where there is none
    scores: np.ndarray  # (Q, k) cosine similarity, or BM25 score; -inf where there is none
    labels: np.ndarray  # (Q, k, C) the rows' teacher probabilities, or values in regression (C = 1)
    names: pa.Array = field(repr=False)  # ids of all rows

    @property
    def ids(self) -> list[list[str]]:
        """Of the rows found; taken when they are asked for, since a vote does not need them."""
        return [self.names.take(pa.array(row[row >= 0])).to_pylist() for row in self.positions]

    def part(self, low: int, high: int) -> Hits:
        """Of the queries low .. high - 1."""
        return Hits(self.positions[low:high], self.scores[low:high], self.labels[low:high], self.names)


def plain(text: Text) -> Text:
    """Whatever its case."""
    first, second = text
    return first.casefold(), None if second is None else second.casefold()


@dataclass(frozen=True)
class View:
    """Rows, vectors and words of one state of a run's knowledge."""

    task: Task
    base: Base
    log: Log | None
    rows: pa.Table  # of the base, then the added ones
    alive: np.ndarray  # (N,) bool: not deleted
    added: Searcher | None  # over the vectors of the added rows
    words: Lexical
    ngrams: Memory
    labels: np.ndarray  # (N, C) teacher probabilities, or values
    ids: pa.Array
    masks: dict[tuple[str | None, str | None], np.ndarray | None] = field(default_factory=dict, repr=False, compare=False)  # see `allowed`

    @staticmethod
    def over(task: Task, base: Base, log: Log | None, places: Places, threads: int, more: pa.Table | None = None) -> View:
        """Read the edits of a log over their base. more: an edit that is not in the log."""
        edits = [read_edit(places.log, e) for e in log.edits] if log and places.log else []
        edits += [] if more is None else [more]
        rows, alive, words, ngrams, added = base.rows, np.ones(base.rows.num_rows, bool), base.words, base.ngrams, None
        if edits:
            table = pa.concat_tables(edits)
            gone = table["deleted"].to_numpy(zero_copy_only=False)
            new = table.filter(pa.array(~gone))
            if new["position"].to_pylist() != list(range(len(rows), len(rows) + len(new))):
                raise ArtifactError(f"{places.log}/{MANIFEST}: the positions of added rows do not go on from {len(rows)}")
            alive = np.ones(len(rows) + len(new), bool)
            alive[table["position"].to_numpy()[gone]] = False
            words = base.words.edited(texts_of(new), alive)
            kept, lost = new.filter(pa.array(alive[len(rows) :])), rows.filter(pa.array(~alive[: len(rows)]))
            ngrams = edited(ngrams, labelled(kept), labelled(lost))
            if len(new):
                added = Searcher.over(matrix(new["vector"]), len(rows), threads)
                rows = pa.concat_tables([rows, new.select(VIEWED)])
        ids = rows["id"].cast(pa.large_string()).combine_chunks()  # one piece: rows are taken from a chunked one slowly
        return View(task, base, log, rows, alive, added, words, ngrams, matrix(rows["teacher_probs"]), ids)

    @cached_property
    def told(self) -> dict[Text, int]:
        """Positions of the live rows that somebody added, by their text as `plain` has it; of equal texts the newest."""
        added = np.flatnonzero(self.alive & pc.equal(self.rows["source"], "added").to_numpy(zero_copy_only=False))
        return {plain(text): int(p) for text, p in zip(texts_of(self.rows.take(pa.array(added))), added, strict=True)}

    def told_of(self, texts: Sequence[Text]) -> np.ndarray:
        """(Q,) positions of the added rows that are these texts word for word; -1: nobody added one."""
        if not self.told:
            return np.full(len(texts), -1)
        return np.array([self.told.get(plain(text), -1) for text in texts], np.int64)

    @property
    def count(self) -> int:
        """Rows that can be found."""
        return int(self.alive.sum())

    @property
    def version(self) -> int:
        """Goes up by one with every edit; 0: as the run made it."""
        return self.log.version if self.log else 0

    @property
    def sources(self) -> list[str]:
        """Where the live rows come from."""
        return sorted(self.rows["source"].filter(pa.array(self.alive)).unique().to_pylist())

    def find(self, ids: list[str]) -> dict[str, int]:
        """Positions of the live rows that have these ids."""
        named = pc.is_in(self.ids, value_set=pa.array(ids, pa.large_string())).to_numpy(zero_copy_only=False)
        positions = np.flatnonzero(named & self.alive)
        return dict(zip(self.ids.take(pa.array(positions)).to_pylist(), positions.tolist(), strict=True))

    def row(self, position: int) -> dict[str, Any]:
        """One row: the columns VIEWED."""
        return self.rows.slice(position, 1).to_pylist()[0]

    def listed(self, words: str, label: str | None, source: str | None) -> np.ndarray:
        """Positions of the live rows, newest first, whose text (or second text) holds `words`, whatever their case. label, source: as `allowed`."""
        mask = self.allowed(label, source)
        found = self.alive if mask is None else mask
        if words:
            columns = [pc.match_substring(self.rows[name], words, ignore_case=True).fill_null(False) for name in TEXT_COLUMNS]
            found = found & pc.or_(*columns).to_numpy(zero_copy_only=False)
        return np.flatnonzero(found)[::-1]

    def allowed(self, label: str | None, source: str | None) -> np.ndarray | None:
        """(N,) bool of the rows that may be found, or None: all. Raises ConfigError on a label or source that does not exist."""
        key = (label, source)
        if key not in self.masks:
            mask = self.alive
            if label is not None:
                if label not in self.task.labels:
                    named = ", ".join(self.task.labels) or "none, it is a regression"
                    raise ConfigError(f"label: found {label!r}; the labels of {self.task.name} are {named}")
                mask = mask & (self.labels.argmax(1) == self.task.labels.index(label))
            if source is not None:
                if source not in self.sources:
                    raise ConfigError(f"source: found {source!r}; the sources of the store are {', '.join(self.sources)}")
                mask = mask & pc.equal(self.rows["source"], source).to_numpy(zero_copy_only=False)
            self.masks[key] = None if mask.all() else mask
        return self.masks[key]

    def search(self, vectors: np.ndarray, k: int, *, label: str | None = None, source: str | None = None) -> Hits:
        """The k nearest rows of each query vector, (Q, width) unit float32. label: only rows that the teacher gives this label."""
        allowed, count = self.allowed(label, source), self.base.rows.num_rows
        positions, similarities = self.base.searcher.search(vectors, k, None if allowed is None else allowed[:count])
        if self.added is not None:
            more = self.added.search(vectors, k, allowed)
            positions, similarities = merge([positions, more[0]], [similarities, more[1]], k)
        return self.hits(positions, similarities)

    def search_words(self, texts: list[Text], k: int, *, label: str | None = None, source: str | None = None) -> Hits:
        """The k rows with the highest BM25 scores for each text; rows that share no word are not found."""
        return self.hits(*self.words.search(texts, k, self.allowed(label, source)))

    def hits(self, positions: np.ndarray, scores: np.ndarray) -> Hits:
        return Hits(positions, scores, self.labels[positions], self.ids)

    def neighbours(self, hits: Hits, by: str, most: int | None = None) -> list[list[Neighbour]]:
        """The rows that each query found, best first, at most `most` of them. by: what they were found by, similarity or bm25."""
        found = []
        for positions, scores in zip(hits.positions.tolist(), hits.scores.tolist(), strict=True):
            pairs = [(p, s) for p, s in zip(positions[:most], scores[:most], strict=True) if p >= 0]
            found.append([replace(self.neighbour(p), **{by: s}) for p, s in pairs])
        return found

    def neighbour(self, position: int) -> Neighbour:
        row = self.row(position)
        label, score = self.task.named(np.asarray(row.pop("teacher_probs")))
        return Neighbour(**row, label=label, score=score)


def labelled(rows: pa.Table) -> tuple[list[Text], np.ndarray]:
    """Texts of some rows, and the teacher's labels of them (n, C)."""
    return texts_of(rows), matrix(rows["teacher_probs"]) if len(rows) else np.zeros((0, 1), np.float32)


@dataclass(frozen=True)
class Neighbour:
    """A row of the store that was found for a text."""

    id: str
    text: str
    text_pair: str | None
    source: str  # generated | corpus | task | unlabelled | added
    asked_label: str | None
    label: str  # the teacher's
    score: float  # its probability, or the value in regression
    similarity: float | None = None  # cosine, where it was found by its vector
    bm25: float | None = None  # where it was found by its words
