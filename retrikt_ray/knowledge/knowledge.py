"""The knowledge of a run, opened for search: its store, its index, and what was edited since.

Rows have positions: those of the base (the run's `store/` and `index/`, or what compaction wrote in their place) come first, added rows go on
behind them. Added rows are searched exactly, in memory, beside the base; deleted ones are passed over. Nothing is answered
before every file was compared with its manifest, and the manifests with each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrikt_ray.index.lexical import Lexical
from retrikt_ray.index.search import Search, Searcher, merge
from retrikt_ray.knowledge import log as edits
from retrikt_ray.knowledge.log import State
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder
from retrikt_ray.runtime.settings import ConfigError

if TYPE_CHECKING:
    from retrikt_ray.teacher.annotator import Text

COLUMNS = ["id", "text", "text_pair", "source", "asked_label", "teacher_probs"]  # of the store, kept in memory
TRIES = 5  # to read a state that others go on changing
REMOTE_LOOK_S = 2.0  # between two looks at the manifest of a run that is not on a local disk


@dataclass(frozen=True)
class Hits:
    """What a search found for Q queries, best first."""

    positions: np.ndarray  # (Q, k) int64, -1 where there is none
    scores: np.ndarray  # (Q, k) cosine similarity, or BM25 score; -inf where there is none
    ids: list[list[str]]  # of the rows found
    labels: np.ndarray  # (Q, k, C) the rows' teacher probabilities, or values in regression (C = 1)

    def part(self, low: int, high: int) -> Hits:
        """Of the queries low .. high - 1."""
        return Hits(self.positions[low:high], self.scores[low:high], self.ids[low:high], self.labels[low:high])


def matrix(column: Any) -> np.ndarray:
    """A column of equally long lists as (n, C) float32."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), -1)


def base_of(run: Folder, state: State | None) -> Folder:
    """The folder that holds `store/` and `index/`: the run, or what compaction wrote."""
    return run if state is None or state.base is None else run / "knowledge" / state.base


def check_origin(run: Folder, state: State) -> None:
    """Raises ArtifactError when the run's own store was made anew since its knowledge was edited."""
    if check(run / "store").content != state.origin:
        raise ArtifactError(
            f"{run}/knowledge/{MANIFEST} holds edits of another store than {run}/store, which was made anew since. Save the added rows with "
            f"`retrikt store export {run} --out added.jsonl`, remove {run}/knowledge, and add them again"
        )


class Knowledge:
    """Rows, vectors and words of a run. `refresh` before a search sees what other processes edited."""

    def __init__(
        self, run: Folder, threads: int = 1, *, edited: bool = True, opener: Callable[[Folder, int], Search] | None = None
    ) -> None:
        """Open and verify. edited=False: as the run made it. opener: who answers dense queries; default: this process.

        Raises ArtifactError that names the file that is missing, altered, or does not belong to the others.
        """
        self.run, self.threads, self.edited = run, threads, edited
        self.folder = run / "knowledge"
        self.opener = opener or Searcher.unsealed
        if not run.exists("config.yaml"):
            raise ArtifactError(f"{run} is not a run directory: it has no config.yaml")
        check(run / "task", deep=True)
        self.task: dict[str, Any] = (run / "task").read_json("task.json")
        self.student = check(run / "student", deep=True).content
        self.seen: Any = None
        self.state: State | None = None
        self.searcher: Search | None = None
        self.looked = 0.0
        self.based = False  # store and index are open, and known to belong together
        self.whole = False  # all of the state that was seen is taken over
        self.follow()

    # opening

    def read_state(self) -> State | None:
        self.seen = self.signature()
        return edits.read_state(self.folder) if self.edited else None

    def signature(self) -> Any:
        """Changes with every edit."""
        if not self.edited or not self.folder.exists(MANIFEST):
            return None
        fs, path = self.folder._fs(MANIFEST)
        info = fs.info(path)
        return [info.get(k) for k in ("mtime", "ino", "size", "ETag", "LastModified")]

    def load_base(self, state: State | None) -> None:
        """Open the store and the index that the state names."""
        self.based = False
        if check(self.run / "student").content != self.student:
            raise ArtifactError(f"{self.run}/student was made anew since this process opened it: start the process again")
        where = base_of(self.run, state)
        if state:
            check_origin(self.run, state)
        # The manifests with each other, before any file with its manifest: a whole manifest of another run must not vouch for anything.
        seals = {name: check(where / name, only=[]) for name in ("store", "index")}
        contents = {"student": self.student} | {name: seal.content for name, seal in seals.items()}
        for name, content in state.contents.items() if state else ():
            if content != contents[name] and name != "student" and where != self.run:
                raise ArtifactError(f"{where}/{name}/{MANIFEST} was exchanged: it is not the one that {self.folder}/{MANIFEST} knows")
            if content != contents[name]:
                raise ArtifactError(
                    f"{self.folder}/{MANIFEST} holds edits of another {name} than {self.run}/{name}: it was made anew since. "
                    f"`retrikt store compact {self.run}` takes the edits over"
                )
        for name in ("student", "store"):
            if seals["index"].inputs.get(name) != contents[name]:
                raise ArtifactError(
                    f"{where}/index/{MANIFEST} says that the index was built from another {name} than "
                    f"{(self.run if name == 'student' else where)}/{name}; run `retrikt index {self.run}`"
                )
        for name in seals:
            check(where / name, deep=True)
        if self.searcher is not None:
            self.searcher.close()  # first: actors of the new base may need the place of the old ones
        self.searcher = self.opener(where / "index", self.threads)
        self.base_words = Lexical.unsealed(where / "index")
        self.card = (where / "index").read_json("index.json")
        self.base = (where / "store").read_tables(columns=COLUMNS)
        for part, found in (("shards", self.card["rows"]), ("words", self.base_words.rows)):
            if found != self.base.num_rows:
                raise ArtifactError(f"{where}/index holds {part} of {found} rows, {where}/store has {self.base.num_rows}")
        self.where, self.state, self.contents, self.based = where, state, contents, True

    def apply_edits(self) -> None:
        """Read the log of the state over the base."""
        log = [edits.read_edit(self.folder, e) for e in (self.state.edits if self.state else [])]
        self.rows, self.alive, self.delta, self.words = self.base, np.ones(self.base.num_rows, bool), None, self.base_words
        if log:
            table = pa.concat_tables(log)
            gone = table["deleted"].to_numpy(zero_copy_only=False)
            new = table.filter(pa.array(~gone))
            if new["position"].to_pylist() != list(range(self.base.num_rows, self.base.num_rows + len(new))):
                raise ArtifactError(f"{self.folder}/{MANIFEST}: the positions of added rows do not go on from {self.base.num_rows}")
            self.alive = np.ones(self.base.num_rows + len(new), bool)
            self.alive[table["position"].to_numpy()[gone]] = False
            texts = list(zip(new["text"].to_pylist(), new["text_pair"].to_pylist(), strict=True))
            self.words = self.base_words.edited(texts, self.alive)
            if len(new):
                self.rows = pa.concat_tables([self.base, new.select(COLUMNS)])
                self.delta = Searcher.over(matrix(new["vector"]), self.base.num_rows, self.threads)
        self.labels = matrix(self.rows["teacher_probs"])  # (N, C)
        self.ids = self.rows["id"].cast(pa.large_string()).combine_chunks()  # one piece: rows are taken from a chunked one slowly
        self.masks: dict[tuple[str | None, str | None], np.ndarray | None] = {}

    def refresh(self, at_once: bool = False) -> bool:
        """Take over what was edited since, by this process or another; True when there was something.

        A run that is not on a local disk is looked at every two seconds, unless at_once.
        """
        if not self.edited:
            return False
        if self.whole and not at_once and not self.run.is_local and time.monotonic() - self.looked < REMOTE_LOOK_S:
            return False
        self.looked = time.monotonic()
        if self.whole and self.signature() == self.seen:
            return False
        self.whole = False  # where this fails, the next search must not be answered from half of it, but try again
        self.follow()
        return True

    def follow(self) -> None:
        """Take over the state that `knowledge/` has now."""
        for attempt in range(TRIES):
            try:
                state = self.read_state()
                base, old = ((s.base if s else None) for s in (state, self.state))
                if not self.based or base != old or (state and state.contents != self.contents):
                    self.load_base(state)
                self.state = state
                self.apply_edits()
                self.whole = True
                return
            except (ArtifactError, FileNotFoundError):  # a file of a state that was replaced while we read it
                if attempt == TRIES - 1 or self.signature() == self.seen:
                    raise

    # reading

    @property
    def count(self) -> int:
        """Rows that can be found."""
        return int(self.alive.sum())

    def find(self, ids: list[str]) -> dict[str, int]:
        """Positions of the live rows that have these ids."""
        there = pc.is_in(self.ids, value_set=pa.array(ids, pa.large_string())).to_numpy(zero_copy_only=False)
        positions = np.flatnonzero(there & self.alive)
        return dict(zip(self.ids.take(pa.array(positions)).to_pylist(), positions.tolist(), strict=True))

    def row(self, position: int) -> dict[str, Any]:
        """One row: id, text, text_pair, source, asked_label, teacher_probs."""
        return self.rows.slice(position, 1).to_pylist()[0]

    def allowed(self, label: str | None, source: str | None) -> np.ndarray | None:
        """(N,) bool of the rows that may be found, or None: all. Raises ConfigError on a label or source that does not exist."""
        key = (label, source)
        if key not in self.masks:
            mask = self.alive
            if label is not None:
                if label not in self.task["labels"]:
                    named = ", ".join(self.task["labels"]) or "none, it is a regression"
                    raise ConfigError(f"label: found {label!r}; the labels of {self.task['name']} are {named}")
                mask = mask & (self.labels.argmax(1) == self.task["labels"].index(label))
            if source is not None:
                known = sorted(self.rows["source"].filter(pa.array(self.alive)).unique().to_pylist())
                if source not in known:
                    raise ConfigError(f"source: found {source!r}; the sources of the store are {', '.join(known)}")
                mask = mask & pc.equal(self.rows["source"], source).to_numpy(zero_copy_only=False)
            self.masks[key] = None if mask.all() else mask
        return self.masks[key]

    def search(self, vectors: np.ndarray, k: int, *, label: str | None = None, source: str | None = None) -> Hits:
        """The k nearest rows of each query vector, (Q, width) unit float32. label: only rows that the teacher gives this label."""
        allowed = self.allowed(label, source)
        base = self.base.num_rows
        assert self.searcher is not None
        positions, similarities = self.searcher.search(vectors, k, None if allowed is None else allowed[:base])
        if self.delta is not None:
            more = self.delta.search(vectors, k, allowed)
            positions, similarities = merge([positions, more[0]], [similarities, more[1]], k)
        return self.hits(positions, similarities)

    def search_words(self, texts: list[Text], k: int, *, label: str | None = None, source: str | None = None) -> Hits:
        """The k rows with the highest BM25 scores for each text; rows that share no word are not found."""
        return self.hits(*self.words.search(texts, k, self.allowed(label, source)))

    def hits(self, positions: np.ndarray, scores: np.ndarray) -> Hits:
        ids = self.ids.take(pa.array(np.maximum(positions, 0).ravel())).to_pylist()
        width = positions.shape[1]
        found = [[ids[i * width + j] for j in range(width) if row[j] >= 0] for i, row in enumerate(positions)]
        return Hits(positions, scores, found, self.labels[positions])
