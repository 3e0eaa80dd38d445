"""The base of a run's knowledge: a store and its index, opened once, and what edits look up in them.

What costs as much as the store has rows is done once a base, most of it when it is first asked for, so that an edit costs what it changes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrikt_ray.index.ngrams import Memory
from retrikt_ray.index.search import Search
from retrikt_ray.index.words.lexical import Lexical
from retrikt_ray.knowledge.log import Log, base_of, check_origin
from retrikt_ray.runtime.artifacts import check
from retrikt_ray.runtime.folders import MANIFEST, ArtifactError, Folder
from retrikt_ray.runtime.tables import Source, matrix
from retrikt_ray.store.rows import VIEWED
from retrikt_ray.task.texts import Text, texts_of

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


@dataclass(frozen=True, eq=False)
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

    @cached_property
    def schema(self) -> pa.Schema:
        """All columns of the store."""
        return Source.of(self.store).schema

    @cached_property
    def labels(self) -> np.ndarray:
        """(N, C) teacher probabilities, or values."""
        return matrix(self.rows["teacher_probs"])

    @cached_property
    def decided(self) -> np.ndarray:
        """(N,) which label has the highest probability."""
        return np.asarray(self.labels.argmax(1))

    @cached_property
    def ids(self) -> pa.Array:
        """In one piece: rows are taken from a chunked column slowly."""
        return self.rows["id"].cast(pa.large_string()).combine_chunks()

    @cached_property
    def sources(self) -> Counter[str]:
        """Where the rows come from, with how many each."""
        return Counter({row["values"]: row["counts"] for row in pc.value_counts(self.rows["source"]).to_pylist()})

    @property
    def learnt(self) -> list[str]:
        """Sources of the rows that the n-gram memory has learnt from; none: all."""
        return learnt_from(self.card)

    @cached_property
    def told(self) -> dict[Text, list[int]]:
        """Positions of the rows that somebody added, ascending, by their text as `plain` has it."""
        added = pc.indices_nonzero(pc.equal(self.rows["source"], "added"))
        found: dict[Text, list[int]] = {}
        for text, position in zip(texts_of(self.rows.take(added)), added.to_pylist(), strict=True):
            found.setdefault(plain(text), []).append(position)
        return found

    @cached_property
    def by_id(self) -> np.ndarray:
        """(N,) positions in the order of the ids."""
        return np.asarray(pc.sort_indices(self.ids))

    def positions(self, name: str) -> list[int]:
        """Of the rows that have an id."""
        at, found = bisect_left(self.by_id, name, key=lambda p: self.ids[int(p)].as_py()), []
        while at < len(self.by_id) and self.ids[int(self.by_id[at])].as_py() == name:
            found.append(int(self.by_id[at]))
            at += 1
        return found

    @cached_property
    def pieces(self) -> tuple[list[pa.RecordBatch], np.ndarray]:
        """The rows as they lie in memory, and where each piece begins, with the end of the last."""
        batches = self.rows.to_batches()
        return batches, np.append(0, np.cumsum([len(b) for b in batches], dtype=np.int64))

    def taken(self, positions: np.ndarray) -> pa.Table:
        """Rows at sorted positions. `Table.take` would go through all pieces."""
        batches, starts = self.pieces
        cuts = np.searchsorted(positions, starts)
        which = np.flatnonzero(np.diff(cuts)).tolist()
        parts = [batches[i].take(pa.array(positions[cuts[i] : cuts[i + 1]] - starts[i])) for i in which]
        return pa.Table.from_batches(parts, self.rows.schema)


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


def learnt_from(card: dict[str, Any]) -> list[str]:
    """By index.json: as `Base.learnt`."""
    sources: list[str] = card.get("ngrams", {}).get("sources", [])  # an earlier index does not say so: it learnt from all
    return sources


def plain(text: Text) -> Text:
    """Whatever its case."""
    first, second = text
    return first.casefold(), None if second is None else second.casefold()
