"""One state of a run's knowledge, opened for search: a base and the edits over it. A view never changes; a newer state is another view.

Rows have positions: those of the base (the run's `store/` and `index/`, or what compaction wrote in their place) come first, added rows go on
behind them. Added rows are searched exactly, in memory, beside the base; deleted ones are passed over. Nothing is answered
before every file was compared with its manifest, and the manifests with each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrikt_ray.index.learning import edited
from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.search import Searcher, merge
from retrikt_ray.index.words.lexical import Lexical
from retrikt_ray.knowledge.base import Base, Places, plain
from retrikt_ray.knowledge.log import Log, read_edit
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError
from retrikt_ray.runtime.settings import ConfigError
from retrikt_ray.runtime.tables import matrix
from retrikt_ray.store.rows import VIEWED
from retrikt_ray.task.card import Task
from retrikt_ray.task.texts import TEXT_COLUMNS, Text, texts_of


@dataclass(frozen=True)
class Hits:
    """What a search found for Q queries, best first."""

    positions: np.ndarray  # (Q, k) int64, -1 where there is none
    scores: np.ndarray  # (Q, k) cosine similarity, or BM25 score; -inf where there is none
    labels: np.ndarray  # (Q, k, C) the rows' teacher probabilities, or values in regression (C = 1)
    view: View = field(repr=False)  # that was searched

    @property
    def ids(self) -> list[list[str]]:
        """Of the rows found; taken when they are asked for, since a vote does not need them."""
        return [self.view.ids_of(row[row >= 0]) for row in self.positions]

    def part(self, low: int, high: int) -> Hits:
        """Of the queries low .. high - 1."""
        return Hits(self.positions[low:high], self.scores[low:high], self.labels[low:high], self.view)


@dataclass(frozen=True)
class View:
    """Rows, vectors and words of one state of a run's knowledge."""

    task: Task
    base: Base
    log: Log | None
    rows: pa.Table  # of the base, then the added ones
    alive: np.ndarray  # (N,) bool: not deleted
    gone: np.ndarray  # sorted positions of the deleted rows
    more: pa.Table  # the added rows
    added: Searcher | None  # over their vectors
    words: Lexical
    ngrams: Memory
    edits: dict[str, pa.Table] = field(default_factory=dict, repr=False, compare=False)  # edits that were read, by SHA-256
    masks: dict[tuple[str | None, str | None], np.ndarray | None] = field(default_factory=dict, repr=False, compare=False)  # see `allowed`

    @staticmethod
    def over(
        task: Task,
        base: Base,
        log: Log | None,
        places: Places,
        threads: int,
        more: pa.Table | None = None,
        read: Mapping[str, pa.Table] | None = None,
    ) -> View:
        """Read the edits of a log over their base, in a time that follows from the edits. more: an edit that is not in the log; read: some that
        were read before."""
        read = read or {}
        known = {e["sha256"]: read.get(e["sha256"]) or read_edit(places.log, e) for e in log.edits} if log and places.log else {}
        edits = [known[e["sha256"]] for e in log.edits] if known and log else []
        edits += [] if more is None else [more]
        count, gone, added = base.rows.num_rows, np.zeros(0, np.int64), None
        words, ngrams, new = base.words, base.ngrams, base.rows.slice(0, 0)
        if edits:
            table = pa.concat_tables(edits)
            deleted = table["deleted"].to_numpy(zero_copy_only=False)
            gone, new = np.unique(table["position"].to_numpy()[deleted]), table.filter(pa.array(~deleted))
            if not np.array_equal(new["position"].to_numpy(), np.arange(count, count + len(new))):
                raise ArtifactError(f"{places.log}/{MANIFEST}: the positions of added rows do not go on from {count}")
            words = base.words.edited(texts_of(new), gone)
            stay = np.ones(len(new), bool)
            stay[gone[gone >= count] - count] = False
            ngrams = edited(ngrams, labelled(new.filter(pa.array(stay))), labelled(base.taken(gone[gone < count]), base.learnt))
            if len(new):
                added = Searcher.over(matrix(new["vector"]), count, threads)
            new = new.select(VIEWED)
        alive = np.ones(count + len(new), bool)
        alive[gone] = False
        rows = pa.concat_tables([base.rows, new]) if len(new) else base.rows
        return View(task, base, log, rows, alive, gone, new, added, words, ngrams, known)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N, C) of all rows; `labels_of` is for some."""
        return np.concatenate([self.base.labels, self.more_labels]) if len(self.more) else self.base.labels

    @cached_property
    def more_labels(self) -> np.ndarray:
        """(n, C) of the added rows."""
        return labelled(self.more)[1]

    @cached_property
    def more_ids(self) -> list[str]:
        """Of the added rows."""
        return [str(i) for i in self.more["id"].to_pylist()]

    def labels_of(self, positions: np.ndarray) -> np.ndarray:
        """(..., C) of some rows; of -1 those of some row."""
        count = self.base.rows.num_rows
        found = self.base.labels[np.minimum(positions, count - 1)]
        late = positions >= count
        found[late] = self.more_labels[positions[late] - count]
        return found

    def ids_of(self, positions: np.ndarray) -> list[str]:
        """Of some rows."""
        count = self.base.rows.num_rows
        early = iter(self.base.ids.take(pa.array(positions[positions < count])).to_pylist())
        return [next(early) if p < count else self.more_ids[p - count] for p in positions.tolist()]

    @cached_property
    def told(self) -> dict[Text, int]:
        """Positions of the live rows that edits added, by their text as `plain` has it; of equal texts the newest."""
        count = self.base.rows.num_rows
        return {plain(text): count + i for i, text in enumerate(texts_of(self.more)) if self.alive[count + i]}

    def told_of(self, texts: Sequence[Text]) -> np.ndarray:
        """(Q,) positions of the added rows that are these texts word for word, the newest; -1: nobody added one."""
        if not self.told and not self.base.told:
            return np.full(len(texts), -1)
        keys = [plain(text) for text in texts]
        before = (next((p for p in reversed(self.base.told.get(key, [])) if self.alive[p]), -1) for key in keys)
        return np.array([self.told.get(key, early) for key, early in zip(keys, before, strict=True)], np.int64)

    @property
    def count(self) -> int:
        """Rows that can be found."""
        return self.rows.num_rows - len(self.gone)

    @property
    def version(self) -> int:
        """Goes up by one with every edit; 0: as the run made it."""
        return self.log.version if self.log else 0

    @property
    def sources(self) -> list[str]:
        """Where the live rows come from."""
        count, found = self.base.rows.num_rows, Counter(self.base.sources)
        found.subtract(self.base.taken(self.gone[self.gone < count])["source"].to_pylist())
        found.update(source for source, lives in zip(self.more["source"].to_pylist(), self.alive[count:].tolist(), strict=True) if lives)
        return sorted(source for source, rows in found.items() if rows)

    def find(self, ids: list[str]) -> dict[str, int]:
        """Positions of the live rows that have these ids."""
        late = dict(
            zip(self.more_ids, range(self.base.rows.num_rows, self.rows.num_rows), strict=True)
        )  # the last row of an id is the live one
        found = {name: [*self.base.positions(name), *([late[name]] if name in late else [])] for name in ids}
        return {name: p for name, positions in found.items() for p in positions if self.alive[p]}

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
                mask = mask & (np.concatenate([self.base.decided, self.more_labels.argmax(1)]) == self.task.labels.index(label))
            if source is not None:
                if source not in self.sources:
                    raise ConfigError(f"source: found {source!r}; the sources of the store are {', '.join(self.sources)}")
                mask = mask & pc.equal(self.rows["source"], source).to_numpy(zero_copy_only=False)
            self.masks[key] = None if mask is self.alive and not len(self.gone) else mask
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
        return Hits(positions, scores, self.labels_of(positions), self)

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


def labelled(rows: pa.Table, sources: Sequence[str] = ()) -> tuple[list[Text], np.ndarray]:
    """Texts of some rows, and the teacher's labels of them (n, C). sources: of those that the n-gram memory has learnt from, beside added ones, if not all."""
    if sources:
        rows = rows.filter(pc.is_in(rows["source"], pa.array([*sources, "added"])))
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
